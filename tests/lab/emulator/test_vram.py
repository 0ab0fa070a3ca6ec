"""The memory of emulated GPUs: never more than there is, on all GPUs or none, free again with its process."""

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

from router.domain.gpu import GpuUuid
from router.lab.emulator import vram
from router.lab.emulator.gpu_reader import write_rig_file
from router.lab.emulator.spec import EmulatorSpec, parse_spec
from tests.support.waiting import eventually_sync

_SPEC = parse_spec("3090+h100")
_FIRST, _SECOND = _SPEC.uuids
_USABLE = {
    uuid: gpu.memory_total_bytes - gpu.memory_reserved_bytes for uuid, gpu in zip(_SPEC.uuids, _SPEC.gpus, strict=True)
}
_WANTED = st.dictionaries(st.sampled_from([_FIRST, _SECOND]), st.integers(0, 50 * 1024**3))


@contextlib.contextmanager
def _holder() -> Generator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
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
@given(st.lists(_WANTED, max_size=6))
def test_gpus_are_never_overdrawn_and_a_refusal_changes_nothing(wishes: list[dict[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name, _holder() as other:
        directory = Path(name)
        write_rig_file(_SPEC, directory)
        pids, held = [os.getpid(), other.pid], dict[int, dict[str, int]]()
        for index, wanted in enumerate(wishes):
            pid = pids[index % 2]
            rest = held.get(pids[1 - index % 2], {})
            fits = all(amount + rest.get(uuid, 0) <= _USABLE[GpuUuid(uuid)] for uuid, amount in wanted.items())
            try:
                vram.allocate(directory, wanted, pid)
                held[pid] = wanted
                assert fits
            except vram.OutOfMemoryError as error:
                assert not fits
                assert error.wanted_bytes > error.free_bytes
            used = vram.used_bytes(directory)
            for uuid, size in _USABLE.items():
                assert used.get(uuid, 0) == sum(one.get(uuid, 0) for one in held.values()) <= size


def test_what_a_killed_process_held_is_free_at_once(directory: Path) -> None:
    with _holder() as process:
        vram.allocate(directory, {_FIRST: _USABLE[_FIRST]}, process.pid)
        assert vram.free_bytes(directory)[_FIRST] == 0
        process.send_signal(signal.SIGKILL)
        # a zombie holds nothing, so nobody has to reap it first
        eventually_sync(lambda: vram.free_bytes(directory)[_FIRST] == _USABLE[_FIRST])
    assert vram.uses(directory) == []
    assert not list((directory / "vram").glob("*.json"))


def test_a_number_that_came_again_is_another_process(directory: Path) -> None:
    vram.allocate(directory, {_FIRST: 5})
    path = directory / "vram" / f"{os.getpid()}.json"
    record = vram.read_json(path)
    vram.write_json(path, {**record, "started": record["started"] - 1})
    assert vram.uses(directory) == []


def test_the_use_of_others_counts_and_may_be_taken_back(directory: Path) -> None:
    vram.set_external(directory, _FIRST, 7 * 1024**3)
    with pytest.raises(vram.OutOfMemoryError):
        vram.allocate(directory, {_FIRST: _USABLE[_FIRST] - 6 * 1024**3})
    vram.set_external(directory, _FIRST, 0)
    vram.allocate(directory, {_FIRST: _USABLE[_FIRST] - 6 * 1024**3})


def test_a_lost_gpu_has_no_room_until_it_is_back(directory: Path) -> None:
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


def test_a_rig_is_written_with_its_gpus_and_says_that_it_is_emulated(directory: Path) -> None:
    data = vram.read_json(directory / "rig.json")
    assert data["emulated"] is True
    assert [gpu["uuid"] for gpu in data["gpus"]] == list(_SPEC.uuids)
    assert (data["version"], data["speed"]) == (EmulatorSpec(()).version, 1.0)
