"""Fault injection: strict parsing, matching of rules, and their effect on running servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from router.lab.emulator import server as server_module
from router.lab.emulator.faults import (
    FILE,
    Behaviour,
    Fault,
    behaviour,
    read_faults,
    server_fault,
    write_faults,
)
from router.supervisor import process
from tests.lab.emulator.conftest import Box, ask, loaded, make_box
from tests.support.ollama_server import OllamaServer
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually, eventually_sync

_8B, _3B = "llama3.1:8b", "llama3.2:3b"


def test_without_a_file_there_are_no_faults(tmp_path: Path) -> None:
    assert read_faults(tmp_path) == read_faults(None) == ()
    assert behaviour((), "gpu0", ["GPU-1"], _8B) == Behaviour()


def test_a_rule_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_faults(tmp_path, [{"instance": "gpu0", "slow": 3}, {"server": "hang"}])
    assert read_faults(tmp_path) == (Fault(instance="gpu0", slow=3), Fault(server="hang"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"slow": 2}, "a list of rules"),
        (["slow"], "a rule is an object"),
        ([{"slwo": 2}], "no key 'slwo'"),
        ([{"slow": 0}], "above 0"),
        ([{"slow": True}], "above 0"),
        ([{"server": "explode"}], "none of hang, die, refuse_start"),
    ],
)
def test_an_invalid_rule_is_refused(tmp_path: Path, rules: Any, message: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_faults(tmp_path)


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Fault(hang=True), True),
        (Fault(hang=True, instance="gpu0"), True),
        (Fault(hang=True, instance="gpu1"), False),
        (Fault(hang=True, gpu="GPU-aa"), True),
        (Fault(hang=True, gpu="GPU-bb"), False),
        (Fault(hang=True, model="LLAMA3.1:8b"), True),
        (Fault(hang=True, model="llama3.1"), False),
        (Fault(hang=True, model="a b/c::d"), False),
    ],
)
def test_a_rule_matches_only_what_it_names(rule: Fault, matches: bool) -> None:
    assert behaviour([rule], "gpu0", ["GPU-aa11"], _8B).hang == matches


def test_several_rules_add_up() -> None:
    rules = [Fault(slow=2), Fault(slow=5, oom=True), Fault(instance="other", die=True), Fault(server="die")]
    assert behaviour(rules, "gpu0", [], _8B) == Behaviour(slow=5, oom=True)
    assert server_fault(rules, "gpu0", []) == "die"


def test_router_and_emulator_use_the_same_instance_variable() -> None:
    assert server_module.INSTANCE_VARIABLE == process.INSTANCE_VARIABLE


def _seconds(server: OllamaServer) -> float:
    """Duration of the two tokens after the first."""
    return ask(server, _8B, options={"num_predict": 3, "seed": 1})[1]["eval_duration"] / 1e9


def test_a_slow_runner_is_slow_and_then_is_not(box: Box) -> None:
    """At this speed a token takes 0.2 ms, and a thousand times longer with the fault."""
    with box.start(0) as server:
        ask(server, _8B)
        write_faults(box.directory, [{"slow": 1000}])
        eventually_sync(lambda: _seconds(server) > 0.3)
        write_faults(box.directory, [])
        eventually_sync(lambda: _seconds(server) < 0.3)


def test_a_load_fails_with_out_of_memory_despite_free_memory(box: Box) -> None:
    write_faults(box.directory, [{"oom": True, "model": _8B}])
    with box.start(0) as server:
        status, answer = ask(server, _8B)
        assert (status, "out of memory" in answer["error"]) == (500, True)
        assert loaded(server) == {}
        assert ask(server, _3B)[0] == 200


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0"])
def test_the_next_load_obeys_the_latest_rules(tmp_path: Path, version: str) -> None:
    box = make_box(tmp_path, "3090", version)
    with box.start(0) as server:
        for _ in range(10):
            write_faults(box.directory, [])
            write_faults(box.directory, [{"oom": True}])
            assert ask(server, _3B)[0] == 500
            write_faults(box.directory, [])
            assert ask(server, _3B)[0] == 200
            assert ask(server, _3B, keep_alive=0)[0] == 200
            eventually_sync(lambda: not loaded(server))
        write_faults(box.directory, [{"oom": True}])
        assert ask(server, _3B)[0] == 500
        (box.directory / FILE).unlink()
        assert ask(server, _3B)[0] == 200


async def test_a_hung_runner_sends_nothing_until_its_model_is_reloaded(box: Box) -> None:
    write_faults(box.directory, [{"hang": True, "instance": "gpu0"}])
    with box.start(0, LLAMAYARD_INSTANCE="run:gpu0") as server, box.start(1, LLAMAYARD_INSTANCE="run:gpu1") as other:
        assert (await call(other.address, "POST", "/api/generate", {"model": _8B, "prompt": "x"})).status == 200
        async with connect(server.address) as client:
            await client.send(request_bytes("POST", "/api/generate", {"model": _8B, "prompt": "x"}))
            await eventually(lambda: _8B in loaded(server))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.head()
            client.abort()
        write_faults(box.directory, [])
        assert server.call("POST", "/api/generate", {"model": _8B, "keep_alive": 0})[0] == 200
        await eventually(lambda: not loaded(server))
        assert (await call(server.address, "POST", "/api/generate", {"model": _8B, "prompt": "x"})).status == 200


async def test_a_runner_that_dies_ends_its_stream_with_an_error(box: Box) -> None:
    write_faults(box.directory, [{"die": True, "model": _8B}])
    with box.start(0) as server:
        reply = await call(server.address, "POST", "/api/generate", {"model": _8B, "prompt": "x"})
        assert (reply.status, reply.end) == (200, "complete")
        assert reply.lines()[-1] == {"error": "an error was encountered while running the model: unexpected EOF"}
        assert ask(server, _3B)[0] == 200


async def test_a_leaked_slot_blocks_the_next_request_until_an_unload(box: Box) -> None:
    write_faults(box.directory, [{"lose_slot": True}])
    text = " ".join(map(str, range(20_000)))  # outlasts the test, and has no repetitions that would end the answer
    long = {"model": _8B, "prompt": "x", "format": {"const": text}}
    with box.start(0, OLLAMA_NUM_PARALLEL="1") as server:
        async with connect(server.address) as disconnecting:
            await disconnecting.send(request_bytes("POST", "/api/generate", long))
            await disconnecting.head()
            assert await disconnecting.chunk()
            disconnecting.abort()
        async with connect(server.address) as queued:
            await queued.send(request_bytes("POST", "/api/generate", {"model": _8B, "prompt": "y"}))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await queued.head()
        write_faults(box.directory, [])
        assert server.call("POST", "/api/generate", {"model": _8B, "keep_alive": 0})[0] == 200
        await eventually(lambda: not loaded(server))
        assert ask(server, _8B)[0] == 200


async def test_a_server_hangs_and_recovers(box: Box) -> None:
    with box.start(0) as server:
        write_faults(box.directory, [{"server": "hang", "gpu": box.uuids[0]}])

        async def hangs() -> bool:
            try:
                async with asyncio.timeout(0.2):
                    return (await call(server.address, "GET", "/api/version")).status != 200
            except TimeoutError:
                return True

        await eventually(hangs)
        assert server.process.poll() is None
        write_faults(box.directory, [])
        assert (await call(server.address, "GET", "/api/version")).status == 200


def test_a_server_dies_with_its_runners(box: Box) -> None:
    with box.start(0) as server:
        ask(server, _8B)
        write_faults(box.directory, [{"server": "die"}])
        eventually_sync(lambda: server.process.poll() is not None)
        assert server.process.returncode == 1
        eventually_sync(lambda: box.used_gb() == [0.0, 0.0])


def test_a_server_refuses_to_start(box: Box) -> None:
    write_faults(box.directory, [{"server": "refuse_start"}])
    with pytest.raises(AssertionError, match="ended with 1"), box.start(0):
        pass


def test_an_invalid_file_is_logged_and_ignored(box: Box) -> None:
    (box.directory / FILE).write_text("[{]", encoding="utf-8")
    with box.start(0) as server:
        assert ask(server, _3B)[0] == 200
        assert "invalid faults file" in server.log.read_text(errors="replace")
