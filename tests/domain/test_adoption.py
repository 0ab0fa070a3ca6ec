"""Which servers of an earlier router are adopted: only those that nothing tells from what would be started now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.adoption import KeptServer, ServerRecord, decide, differences_between, relevant
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec

_SPEC = InstanceSpec(
    InstanceName("gpu0"), (GpuUuid("GPU-a"),), "http://127.0.0.1:20001", environment={"OLLAMA_NUM_PARALLEL": "2"}
)
_RECORD = ServerRecord(_SPEC, ("/usr/bin/ollama", "serve"), "/usr/bin/ollama 7 100 5", {"HOME": "/home/x"})


def _kept(**changes: Any) -> KeptServer:
    server = KeptServer(InstanceName("gpu0"), 100, _RECORD, "0.34.0", "0.34.0", owns_port=True)
    return replace(server, **changes)


def _reason(server: KeptServer, wanted: ServerRecord | None = _RECORD) -> str:
    (verdict,) = decide([(server, wanted)])
    return verdict.reason


def test_a_server_that_is_well_and_configured_alike_is_adopted() -> None:
    assert _reason(_kept()) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"record": None}, "another version of the router started it"),
        ({"version": ""}, "it was not ready"),
        ({"owns_port": False}, "it does not listen on its port"),
        ({"answers": ""}, "it does not answer"),
        ({"answers": "0.35.0"}, "its version was 0.34.0 and is 0.35.0"),
    ],
)
def test_a_server_that_is_not_well_is_not_adopted(changes: dict[str, Any], reason: str) -> None:
    assert _reason(_kept(**changes)) == reason


def test_a_server_that_no_instance_wants_is_not_adopted() -> None:
    assert _reason(_kept(), None) == "no such instance is configured"


_CHANGES: list[tuple[Callable[[ServerRecord], ServerRecord], str]] = [
    (lambda r: replace(r, spec=replace(r.spec, gpus=())), "GPUs"),
    (lambda r: replace(r, spec=replace(r.spec, gpus=(*r.spec.gpus, GpuUuid("GPU-b")))), "GPUs"),
    (lambda r: replace(r, spec=replace(r.spec, engine="other")), "engine"),
    (lambda r: replace(r, spec=replace(r.spec, url="http://127.0.0.1:1")), "address"),
    (lambda r: replace(r, spec=replace(r.spec, num_parallel=9)), "num_parallel"),
    (lambda r: replace(r, spec=replace(r.spec, context_length=9)), "context_length"),
    (lambda r: replace(r, spec=replace(r.spec, kv_cache_type="q8_0")), "kv_cache_type"),
    (lambda r: replace(r, spec=replace(r.spec, flash_attention=True)), "flash_attention"),
    (lambda r: replace(r, spec=replace(r.spec, on_demand=True)), "whether it runs on demand"),
    (lambda r: replace(r, spec=replace(r.spec, environment={})), "OLLAMA_NUM_PARALLEL"),
    (lambda r: replace(r, command=("/bin/other", "serve")), "command"),
    (lambda r: replace(r, program="/usr/bin/ollama 8 100 6"), "the executable file"),
    (lambda r: replace(r, inherited={"HOME": "/home/y"}), "HOME"),
]


@given(st.sets(st.sampled_from(range(len(_CHANGES))), min_size=1))
def test_whatever_differs_is_named_and_prevents_the_adoption(which: set[int]) -> None:
    wanted = _RECORD
    for index in which:
        wanted = _CHANGES[index][0](wanted)
    named = differences_between(_RECORD, wanted)
    assert {_CHANGES[index][1] for index in which} == set(named)
    assert _reason(_kept(), wanted) == f"configured differently: {', '.join(named)}"


_SERVERS = st.builds(
    _kept,
    name=st.sampled_from([InstanceName("gpu0"), InstanceName("gpu1")]),
    pid=st.integers(1, 9),
    record=st.sampled_from([_RECORD, None]),
    version=st.sampled_from(["", "0.34.0"]),
    answers=st.sampled_from(["", "0.34.0", "0.35.0"]),
    owns_port=st.booleans(),
)


@given(st.lists(st.tuples(_SERVERS, st.sampled_from([_RECORD, None]))))
def test_each_gets_one_verdict_and_no_name_is_given_twice(found: list[tuple[KeptServer, ServerRecord | None]]) -> None:
    verdicts = decide(found)
    assert [verdict.server for verdict in verdicts] == [server for server, _ in found]
    names = [verdict.server.name for verdict in verdicts if verdict.is_adopted]
    assert len(names) == len(set(names))
    well = {server.name for server, wanted in found if not _reason(server, wanted)}
    assert well == set(names)  # a server that is not well takes nobody's place


def test_variables_of_a_shell_or_a_service_manager_are_not_relevant() -> None:
    shell = {"PWD": "/x", "SHLVL": "2", "TERM": "xterm", "INVOCATION_ID": "7", "SSH_TTY": "/dev/pts/1", "PATH": "/bin"}
    kept = {"HOME": "/x", "CUDA_CACHE_PATH": "/y", "GGML_CUDA_NO_VMM": "1", "https_proxy": "http://p"}
    assert relevant({**shell, **kept}) == kept
