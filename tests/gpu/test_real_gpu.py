"""The NVML reader over a real GPU, against nvidia-smi. Skipped where there is none."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator

import pytest

from router.gpu.nvml import NoGpus, NvmlReader, open_nvml

pytestmark = pytest.mark.gpu
_MEBIBYTE = 1 << 20


@pytest.fixture
def reader() -> Iterator[NvmlReader]:
    opened = open_nvml()
    if isinstance(opened, NoGpus):
        pytest.skip(opened.reason)
    yield opened
    opened.close()


def _nvidia_smi(*fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return list(csv.reader(output.splitlines(), skipinitialspace=True))


def test_every_gpu_is_read_as_nvidia_smi_reads_it(reader: NvmlReader) -> None:
    gpus = reader.read()
    rows = _nvidia_smi("uuid", "name", "memory.total", "memory.used")
    assert [[gpu.uuid, gpu.name] for gpu in gpus] == [row[:2] for row in rows]
    for gpu, (_, _, total, used) in zip(gpus, rows, strict=True):
        assert abs(gpu.memory_total_bytes / _MEBIBYTE - float(total)) < 2
        assert abs(gpu.memory_used_bytes / _MEBIBYTE - float(used)) < 600, "other programs may start meanwhile"


def test_a_reading_adds_up(reader: NvmlReader) -> None:
    for gpu in reader.read():
        parts = gpu.memory_used_bytes + gpu.memory_free_bytes + (gpu.memory_reserved_bytes or 0)
        assert abs(parts - gpu.memory_total_bytes) <= 2 * _MEBIBYTE
        assert gpu.error is None
