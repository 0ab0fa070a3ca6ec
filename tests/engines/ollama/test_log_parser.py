"""The log lines about GPUs of several server versions."""

from __future__ import annotations

import pytest

from router.domain.gpu import GpuUuid
from router.engines.ollama.log_parser import (
    ComputeDevice,
    gpus_problem,
    parse_compute_line,
    unexpected_devices,
)

A, B = GpuUuid("GPU-8a0c1111-aaaa-bbbb-cccc-000000000001"), GpuUuid("GPU-8a0c1111-aaaa-bbbb-cccc-000000000002")
PREFIX = 'time=2026-01-01T00:00:00.000Z level=INFO source=types.go:42 msg="inference compute" '
CPU_0_24 = (
    'id=cpu library=cpu compute="" name=cpu description=cpu libdirs=ollama driver="" pci_id="" type="" '
    'total="23.5 GiB" available="21.4 GiB"'
)
CPU_0_11 = 'id=0 library=cpu variant="" compute="" driver=0.0 name="" total="23.5 GiB" available="22.8 GiB"'
GPU_0_11 = f'id={A} library=cuda variant=v12 compute=8.6 driver=12.4 name="NVIDIA GeForce RTX 3090" total="23.7 GiB"'
GPU_0_24 = f'id={A} library=CUDA compute=8.6 name=CUDA0 description="NVIDIA GeForce RTX 3090" libdirs=ollama,cuda_v13'
GPU_0_30 = 'id=0 filter_id="" library=CUDA compute=8.6 name=CUDA0 description="a \\"quoted\\" id=9" type=discrete'


@pytest.mark.parametrize(
    ("fields", "device"),
    [
        (CPU_0_24, ComputeDevice("cpu", "cpu")),
        (CPU_0_11, ComputeDevice("0", "cpu")),
        (GPU_0_11, ComputeDevice(A, "cuda")),
        (GPU_0_24, ComputeDevice(A, "CUDA")),
        (GPU_0_30, ComputeDevice("0", "CUDA")),
    ],
)
def test_the_lines_of_all_versions_are_parsed(fields: str, device: ComputeDevice) -> None:
    assert parse_compute_line(PREFIX + fields) == device


def test_other_lines_are_ignored() -> None:
    assert parse_compute_line('level=INFO msg="discovering available GPUs..." id=GPU-1 library=CUDA') is None


def test_gpus_that_are_named_must_be_the_right_ones() -> None:
    assert gpus_problem((A, B), [ComputeDevice(B.upper(), "CUDA"), ComputeDevice(A, "CUDA")]) is None
    problem = gpus_problem((A, B), [ComputeDevice(A, "CUDA"), ComputeDevice("GPU-other", "CUDA")])
    assert problem == f"does not see its GPUs {B}: it reports {A} (CUDA), GPU-other (CUDA)"


def test_gpus_that_are_only_numbered_are_counted() -> None:
    two = [ComputeDevice("0", "CUDA"), ComputeDevice("1", "CUDA")]
    assert gpus_problem((A, B), two) is None
    assert gpus_problem((A, B), two[:1]) == f"does not see its GPUs {B}: it reports 0 (CUDA)"


def test_the_cpu_is_no_gpu() -> None:
    assert gpus_problem((A,), [ComputeDevice("cpu", "cpu")]) == f"does not see its GPUs {A}: it reports cpu (cpu)"
    assert gpus_problem((A,), [ComputeDevice("0", "cpu")]) is not None
    assert gpus_problem((), [ComputeDevice("cpu", "cpu")]) is None


def test_a_mig_device_may_be_reported_under_its_gpus_uuid() -> None:
    assert gpus_problem((GpuUuid("MIG-1"),), [ComputeDevice(A, "CUDA")]) is None


def test_gpus_beyond_those_given_are_noticed() -> None:
    external = ComputeDevice("0", "Vulkan")
    assert unexpected_devices((A,), [ComputeDevice(A, "CUDA"), external]) == (external,)
    assert unexpected_devices((), [ComputeDevice("cpu", "cpu")]) == ()
