"""Emulated GPUs as the router's GPU poller reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from router.lab.emulator import vram
from router.lab.emulator.gpu_reader import EmulatedGpuReader, write_rig_file
from router.lab.emulator.spec import parse_spec, spec_from_mapping

_SPEC = parse_spec("2x3090")


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_rig_file(_SPEC, tmp_path)
    return tmp_path


def test_total_memory_is_free_plus_used_plus_reserved(directory: Path) -> None:
    vram.allocate(directory, {_SPEC.uuids[1]: 5_000_000_000})
    vram.set_external(directory, _SPEC.uuids[1], 1_000_000_000)
    for gpu in EmulatedGpuReader(directory).read():
        assert gpu.memory_reserved_bytes is not None
        assert gpu.memory_total_bytes == gpu.memory_free_bytes + gpu.memory_used_bytes + gpu.memory_reserved_bytes
    first, second = EmulatedGpuReader(directory).read()
    assert (first.memory_used_bytes, first.processes) == (0, ())
    assert second.memory_used_bytes == 6_000_000_000
    assert [(process.pid, process.used_bytes) for process in second.processes] == [(os.getpid(), 5_000_000_000)]


def test_a_lost_gpu_keeps_its_index_and_has_an_error(directory: Path) -> None:
    vram.set_lost(directory, _SPEC.uuids[0])
    first, second = EmulatedGpuReader(directory).read()
    assert (first.uuid, first.error, second.error) == (_SPEC.uuids[0], "GPU is lost", None)


def test_faults_of_the_specification_hold_while_it_has_them(tmp_path: Path) -> None:
    changed = {"external_bytes": 1_000_000_000, "is_lost": True, "temperature_celsius": 91, "pcie_width_max": 32}
    spec = spec_from_mapping({"gpus": [{"gpu": 3090, **changed}, 3090]})
    write_rig_file(spec, tmp_path)
    vram.set_external(tmp_path, spec.uuids[0], 500_000_000)
    first, second = EmulatedGpuReader(tmp_path).read()
    assert (first.memory_used_bytes, first.error, first.temperature_celsius) == (1_500_000_000, "GPU is lost", 91)
    assert (first.pcie_width, first.pcie_width_max, second.pcie_width_max) == (16, 32, 16)
    assert vram.free_bytes(tmp_path).keys() == {spec.uuids[1]}
    write_rig_file(_SPEC, tmp_path)
    first, _ = EmulatedGpuReader(tmp_path).read()
    assert (first.memory_used_bytes, first.error) == (500_000_000, None)


def test_a_computing_gpu_is_busy_and_warms_up(directory: Path) -> None:
    clock, ages = _Clock(), {"age": 0.1}
    reader = EmulatedGpuReader(directory, clock, lambda _: ages["age"])
    vram.allocate(directory, {_SPEC.uuids[0]: 1})
    cold, idle = reader.read()
    clock.now = 15.0
    warm, still_idle = reader.read()
    clock.now = 600.0
    hot, _ = reader.read()
    assert (cold.utilization_ratio, idle.utilization_ratio) == (0.95, 0.0)
    assert cold.temperature_celsius == idle.temperature_celsius == still_idle.temperature_celsius
    assert cold.temperature_celsius is not None
    assert warm.temperature_celsius is not None
    assert hot.temperature_celsius is not None
    assert cold.temperature_celsius < warm.temperature_celsius < hot.temperature_celsius
    assert cold.power_draw_watts is not None
    assert idle.power_draw_watts is not None
    assert cold.power_draw_watts > 5 * idle.power_draw_watts
    assert (cold.pcie_generation, idle.pcie_generation, idle.pcie_generation_max) == (4, 1, 4)
    ages["age"] = 30.0
    clock.now = 601.0
    assert reader.read()[0].utilization_ratio == 0.0


def test_a_missing_directory_has_no_gpus(tmp_path: Path) -> None:
    assert EmulatedGpuReader(tmp_path / "nothing").read() == ()
