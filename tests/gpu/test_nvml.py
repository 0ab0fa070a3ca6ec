"""The NVML reader over the real nvidia-ml-py and a fake libnvidia-ml.so.1 that is compiled here. Needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_SOURCE = Path(__file__).parent / "native" / "fake_nvml.c"
_ROOT = Path(__file__).parents[2]
_READ = """
import dataclasses, json, sys
from router.gpu.nvml import NoGpus, open_nvml
reader = open_nvml()
if isinstance(reader, NoGpus):
    print(json.dumps(reader.reason))
else:
    print(json.dumps([[dataclasses.asdict(g) | {"bandwidth": g.bandwidth_bytes_per_second} for g in reader.read()]
                      for _ in range(int(sys.argv[1]))]))
    reader.close()
"""
_HEALTH = """
import dataclasses, json
from router.gpu.nvml import open_nvml
reader = open_nvml()
reader.read()
print(json.dumps([reader.driver_version(), [dataclasses.asdict(each) for each in reader.health().values()]]))
"""
_OPTIONAL = (
    "memory_reserved_bytes", "compute_capability", "pcie_generation", "pcie_generation_max", "pcie_width",
    "pcie_width_max", "temperature_celsius", "power_draw_watts", "power_limit_watts", "utilization_ratio",
    "memory_bus_width_bits", "memory_clock_hertz", "bandwidth",
)  # fmt: skip
_MIB = 1024**2
_GIB = 1024**3

Read = Callable[..., Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a freshly compiled libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        message = "no C compiler (cc) to build the emulated NVML library with"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", target, _SOURCE], check=True, timeout=300)
    return folder


@pytest.fixture
def read(library: Path) -> Read:
    """Reads the GPUs `times` times in a new process, because nvidia-ml-py loads its library once and by name."""

    def run(scenario: str = "", times: int = 1, folder: Path = library) -> Any:
        environment = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": scenario, "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, "-c", _READ, str(times)], env=environment, cwd=_ROOT, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_all_values_of_all_gpus_are_read(read: Read) -> None:
    ((first, second),) = read()
    assert first == {
        "uuid": "GPU-00000000-1111-2222-3333-444444444444",
        "index": 0,
        "name": "NVIDIA GeForce RTX 3090",
        "memory_total_bytes": 24 * _GIB,
        "memory_free_bytes": 22 * _GIB - 300 * _MIB,
        "memory_used_bytes": 2 * _GIB,
        "memory_reserved_bytes": 300 * _MIB,
        "compute_capability": [8, 6],
        "pcie_generation": 1,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "temperature_celsius": 41,
        "power_draw_watts": 30.5,
        "power_limit_watts": 350.0,
        "utilization_ratio": 0.75,
        "memory_bus_width_bits": 384,
        "memory_clock_hertz": 9_751_000_000,
        "processes": [
            {"pid": 777, "used_bytes": 12 * _MIB, "server_ports": []},
            {"pid": 1234, "used_bytes": None, "server_ports": []},
            {"pid": 4321, "used_bytes": 1500 * _MIB, "server_ports": []},
        ],
        "error": None,
        "throttle_reasons": ["sw_power_cap"],
        "ecc_errors_uncorrected": 3,
        "xids": [],
        "bandwidth": 936_096_000_000.0,  # the data sheet of a 3090 says 936 GB/s
    }
    assert (second["index"], second["name"], second["compute_capability"]) == (1, "NVIDIA GeForce RTX 4090", [8, 9])
    assert second["processes"] == []


def test_an_xid_is_reported_once_for_its_gpu_and_trouble_is_named(read: Read) -> None:
    readings = read("xid1", times=4)
    assert [[gpu["xids"] for gpu in gpus] for gpus in readings] == [[[], []], [[], [79]], [[], []], [[], []]]
    assert readings[0][1]["throttle_reasons"] == ["hw_power_brake_slowdown"]
    assert readings[0][1]["ecc_errors_uncorrected"] == 3


def test_a_driver_without_events_reports_no_xid(read: Read) -> None:
    ((first, second),) = read("noevents,xid1")
    assert (first["xids"], second["xids"]) == ([], [])


def _health(library: Path, scenario: str) -> Any:
    environment = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": scenario, "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", _HEALTH], env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_settings_and_error_counts_are_read_for_the_doctor(library: Path) -> None:
    driver, (first, second) = _health(library, "")
    assert driver == "570.133.20"
    assert first == {
        "persistence_mode": False,
        "ecc_mode": False,
        "ecc_mode_pending": True,
        "ecc_uncorrected_errors": 3,
        "row_remap_failed": False,
    }
    assert (second["persistence_mode"], second["row_remap_failed"]) == (True, True)


def test_a_gpu_without_these_settings_has_none_of_them(library: Path) -> None:
    _, (first, _) = _health(library, "bare")
    assert set(first.values()) == {None}


def test_a_driver_without_the_second_memory_call_has_no_reserved_bytes(read: Read) -> None:
    ((first, _),) = read("nov2")
    assert first["memory_reserved_bytes"] is None
    assert first["memory_used_bytes"] == 2 * _GIB + 300 * _MIB
    assert first["memory_free_bytes"] + first["memory_used_bytes"] == first["memory_total_bytes"]


def test_processes_are_read_from_an_older_driver(read: Read) -> None:
    ((first, _),) = read("oldprocs")
    assert [process["pid"] for process in first["processes"]] == [777, 1234, 4321]


def test_unsupported_values_are_absent_and_not_zero(read: Read) -> None:
    ((first, second),) = read("bare,nov2")
    for gpu in (first, second):
        assert {name: gpu[name] for name in _OPTIONAL} == dict.fromkeys(_OPTIONAL)
        assert gpu["memory_total_bytes"] == 24 * _GIB
        assert gpu["error"] is None


def test_a_lost_gpu_keeps_its_last_values_and_hides_no_other(read: Read) -> None:
    before, lost, still_lost, back = read("lost1", times=4)
    assert [gpu["error"] for gpu in before] == [None, None]
    for reading in (lost, still_lost):
        assert reading[0]["error"] is None
        assert reading[1] == {**before[1], "error": "GPU is lost"}
    assert back == before


def test_a_gpu_that_was_lost_before_the_start_hides_no_other(read: Read) -> None:
    ((only,),) = read("gone1")
    assert only["index"] == 0


def test_a_gpu_in_mig_mode_is_replaced_by_its_mig_devices(read: Read) -> None:
    ((whole, *mig_devices),) = read("mig")
    assert whole["uuid"].startswith("GPU-")
    assert [(device["uuid"], device["index"]) for device in mig_devices] == [
        ("MIG-00000000-0000-0000-0000-000000000000", 2),
        ("MIG-00000000-0000-0000-0000-000000000001", 3),
    ]
    assert {device["memory_total_bytes"] for device in mig_devices} == {10 * _GIB}
    assert {device["temperature_celsius"] for device in mig_devices} == {41}
    assert {device["bandwidth"] for device in mig_devices} == {None}


def test_the_reason_says_that_there_is_no_gpu(read: Read) -> None:
    assert read("none") == "the NVIDIA driver is installed, but it found no GPU"


def test_the_reason_has_the_drivers_error(read: Read) -> None:
    reason = read("noinit")
    assert reason.startswith("the NVIDIA driver does not answer: ")
    assert "mismatch" in reason


def test_the_reason_names_a_library_that_cannot_be_loaded(read: Read, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    assert "libnvidia-ml.so.1" in read(folder=tmp_path)
