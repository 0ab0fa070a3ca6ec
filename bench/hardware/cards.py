"""The GPU under examination: a real one, read by NVML and nvidia-smi, or an EMULATED one of a running rig."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from router.domain.gpu import Gpu
from router.gpu.nvml import NoGpus, NvmlReader, open_nvml
from router.lab.emulator.gpu_reader import EmulatedGpuReader
from router.lab.emulator.vram import set_external

_HOLD_SECONDS_MAX = 60.0
_SMI_FIELDS = ("uuid", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu", "power.draw")


class Card(Protocol):
    """One GPU. `label` is empty, or says that nothing here was seen on a real card."""

    label: str

    def read(self) -> Gpu: ...
    def smi(self) -> dict[str, str]: ...
    def held(self, amount_bytes: int) -> contextlib.AbstractContextManager[str]: ...
    def evict_page_cache(self, weights: Path) -> None: ...


class RealCard:
    """The first GPU of this machine."""

    label = ""

    def __init__(self) -> None:
        reader = open_nvml()
        if isinstance(reader, NoGpus):
            raise SystemExit(f"{reader.reason}; --rig 3090 examines an EMULATED GPU")
        self._reader: NvmlReader = reader

    def read(self) -> Gpu:
        """By NVML."""
        return self._reader.read()[0]

    def smi(self) -> dict[str, str]:
        """What nvidia-smi prints of it, by field."""
        command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return dict(zip(_SMI_FIELDS, next(csv.reader(io.StringIO(output), skipinitialspace=True)), strict=True))

    @contextlib.contextmanager
    def held(self, amount_bytes: int) -> Generator[str]:
        """Another process takes so much memory until the block ends. Yields its answer: `held`, or why not."""
        with subprocess.Popen(
            [sys.executable, __file__, str(amount_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout is not None and holder.stdin is not None
            try:
                yield holder.stdout.readline().strip()
            finally:
                holder.stdin.close()
                holder.wait(_HOLD_SECONDS_MAX)

    def evict_page_cache(self, weights: Path) -> None:
        """Forgets what the host's memory holds of a file."""
        import os  # noqa: PLC0415

        with weights.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class EmulatedCard:
    """The first GPU of a rig whose directory is `directory`."""

    label = "EMULATED: no card was seen"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader = EmulatedGpuReader(directory)

    def read(self) -> Gpu:
        """As the router reads it."""
        return self._reader.read()[0]

    def smi(self) -> dict[str, str]:
        """There is no second program to ask."""
        return {}

    @contextlib.contextmanager
    def held(self, amount_bytes: int) -> Generator[str]:
        """An emulated program takes so much memory of the GPU, until the block ends."""
        uuid = self.read().uuid
        set_external(self._directory, uuid, amount_bytes)
        try:
            yield "held"
        finally:
            set_external(self._directory, uuid, 0)

    def evict_page_cache(self, weights: Path) -> None:
        """Forgets every file, as after a start of the machine."""
        (self._directory / "pagecache.json").unlink(missing_ok=True)


def unload_curve(card: Card, seconds: float, step_seconds: float = 0.05) -> list[tuple[float, int]]:
    """Used bytes of the card from now on: pairs of seconds and bytes, where they changed by 16 MiB or more."""
    started, curve = time.monotonic(), list[tuple[float, int]]()
    while (at := time.monotonic() - started) < seconds:
        used = card.read().memory_used_bytes
        if not curve or abs(used - curve[-1][1]) >= 16 << 20:
            curve.append((round(at, 3), used))
        time.sleep(step_seconds)
    return curve


def _hold(amount_bytes: int) -> str:
    """Allocates by the driver's own interface, which every machine with a driver has."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuCtxCreate_v2", (ctypes.byref(context), 0, device)),
        ("cuMemAlloc_v2", (ctypes.byref(pointer), ctypes.c_size_t(amount_bytes))),
    ):
        if status := getattr(cuda, name)(*arguments):
            return f"{name} answered {status}"
    return "held"


if __name__ == "__main__":
    print(_hold(int(sys.argv[1])), flush=True)
    sys.stdin.read()
