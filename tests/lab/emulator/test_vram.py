"""Memory of emulated GPUs: never overcommitted, allocated on all GPUs or none, freed when the process dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.lab.emulator import vram
from router.lab.emulator.gpu_reader import write_rig_file
from router.lab.emulator.spec import EmulatorSpec, parse_spec
from tests.support.waiting import eventually_sync

_SPEC = parse_spec("3090+h100")
_FIRST, _SECOND = _SPEC.uuids
_USABLE: dict[str, int] = {
    uuid: gpu.memory_total_bytes - gpu.memory_reserved_bytes for uuid, gpu in zip(_SPEC.uuids, _SPEC.gpus, strict=True)
}
_REQUESTS = st.dictionaries(st.sampled_from([_FIRST, _SECOND]), st.integers(0, 50 * 1024**3))


@contextlib.contextmanager
def _holder() -> Generator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    with subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_rig_file(_SPEC, tmp_path)
    return tmp_path


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(_REQUESTS, max_size=6))
def test_gpus_are_never_overcommitted_and_a_refusal_changes_nothing(requests: list[dict[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, _holder() as other:
        directory = Path(name)
        write_rig_file(_SPEC, directory)
        pids, held = [os.getpid(), other.pid], dict[int, dict[str, int]]()
        for index, requested in enumerate(requests):
            pid = pids[index % 2]
            other_use = held.get(pids[1 - index % 2], {})
            fits = all(amount + other_use.get(uuid, 0) <= _USABLE[uuid] for uuid, amount in requested.items())
            try:
                vram.allocate(directory, requested, pid)
                held[pid] = requested
                assert fits
            except vram.OutOfMemoryError as error:
                assert not fits
                assert error.wanted_bytes > error.free_bytes
            used = vram.used_bytes(directory)
            for uuid, size in _USABLE.items():
                assert used.get(uuid, 0) == sum(allocated.get(uuid, 0) for allocated in held.values()) <= size


def test_the_memory_of_a_killed_process_is_free_at_once(directory: Path) -> None:
    with _holder() as process:
        vram.allocate(directory, {_FIRST: _USABLE[_FIRST]}, process.pid)
        assert vram.free_bytes(directory)[_FIRST] == 0
        process.send_signal(signal.SIGKILL)
        # a zombie holds no memory, so it need not be reaped first
        eventually_sync(lambda: vram.free_bytes(directory)[_FIRST] == _USABLE[_FIRST])
    assert vram.allocations(directory) == []
    assert not list((directory / "vram").glob("*.json"))


def test_a_reused_pid_is_another_process(directory: Path) -> None:
    vram.allocate(directory, {_FIRST: 5})
    path = directory / "vram" / f"{os.getpid()}.json"
    record = vram.read_json(path)
    vram.write_json(path, {**record, "started": record["started"] - 1})
    assert vram.allocations(directory) == []


def test_external_use_counts_and_can_be_reset(directory: Path) -> None:
    vram.set_external(directory, _FIRST, 7 * 1024**3)
    with pytest.raises(vram.OutOfMemoryError):
        vram.allocate(directory, {_FIRST: _USABLE[_FIRST] - 6 * 1024**3})
    vram.set_external(directory, _FIRST, 0)
    vram.allocate(directory, {_FIRST: _USABLE[_FIRST] - 6 * 1024**3})


def test_a_lost_gpu_has_no_memory_until_it_is_back(directory: Path) -> None:
    vram.set_lost(directory, _SECOND)
    assert list(vram.free_bytes(directory)) == [_FIRST]
    with pytest.raises(vram.OutOfMemoryError):
        vram.allocate(directory, {_SECOND: 1})
    vram.set_lost(directory, _SECOND, lost=False)
    vram.allocate(directory, {_SECOND: 1})


def test_broken_files_read_as_empty(directory: Path) -> None:
    (directory / "foreign.json").write_text("{", encoding="utf-8")
    assert vram.used_bytes(directory) == {}


def test_a_directory_without_gpus_has_no_memory(tmp_path: Path) -> None:
    assert vram.free_bytes(tmp_path) == {}


def test_the_rig_file_lists_the_gpus_and_is_marked_as_emulated(directory: Path) -> None:
    data = vram.read_json(directory / "rig.json")
    assert data["emulated"] is True
    assert [gpu["uuid"] for gpu in data["gpus"]] == list(_SPEC.uuids)
    assert (data["version"], data["speed"]) == (EmulatorSpec(()).version, 1.0)
