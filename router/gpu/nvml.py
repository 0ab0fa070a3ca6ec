"""Reads NVIDIA GPUs through NVML: the one file that imports `pynvml` (distribution `nvidia-ml-py`).

Blocking, for one thread at a time; `gpus.GpuPoller` keeps it off the event loop. Changes no setting of a GPU. Sources:
NVML API reference (device queries, multi-instance GPU management); field names are `core.entities.Gpu`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pynvml  # pyright: ignore[reportMissingTypeStubs] (there are none)
import structlog

from router.domain.gpu import Gpu, GpuProcess, GpuUuid

_nvml: Any = pynvml

_FATAL_TO_A_GPU: tuple[type[Exception], ...] = (
    _nvml.NVMLError_GpuIsLost,
    _nvml.NVMLError_ResetRequired,
    _nvml.NVMLError_DriverNotLoaded,
    _nvml.NVMLError_Uninitialized,
)
"""What makes all values of a GPU worthless; any other error makes one value absent."""

_ERRORS: tuple[type[Exception], ...] = (_nvml.NVMLError, _nvml.NVMLLibraryMismatchError)
_HERTZ_PER_MEGAHERTZ = 1_000_000


@dataclass(frozen=True, slots=True)
class NoGpus:
    """Why there is nothing to read."""

    reason: str


@dataclass(slots=True)
class _Device:
    """A handle with what never changes about it, and its last reading."""

    handle: Any | None
    """None while the driver does not give one, as for a GPU that was lost before the start."""
    index: int
    parent: Any | None = None
    """The whole GPU's handle, where this is a MIG device."""
    fixed: Gpu | None = None
    """Everything that cannot change; memory figures in it are of no use."""
    last: Gpu | None = None
    error: str | None = None


def open_nvml() -> NvmlReader | NoGpus:
    """A reader of all GPUs, or why there is none: no driver, a driver that does not answer, no GPU."""
    try:
        _nvml.nvmlInit()
    except _nvml.NVMLError_LibraryNotFound:
        return NoGpus("no NVIDIA driver is installed (libnvidia-ml.so.1 is not there)")
    except _ERRORS as error:
        return NoGpus(f"the NVIDIA driver does not answer: {error}")
    try:
        reader = NvmlReader(list(_devices()))
    except _ERRORS as error:
        _nvml.nvmlShutdown()
        return NoGpus(f"the NVIDIA driver does not list its gpus: {error}")
    if not reader.device_count:
        reader.close()
        return NoGpus("the NVIDIA driver is there, but no GPU is")
    return reader


class NvmlReader:
    """Satisfies `gpus.GpuReader`. Made by `open_nvml`."""

    def __init__(self, devices: list[_Device]) -> None:
        self._devices = devices
        self._log = structlog.get_logger("router.gpu.nvml")

    @property
    def device_count(self) -> int:
        """GPUs and MIG devices that the driver listed, readable or not."""
        return len(self._devices)

    def read(self) -> tuple[Gpu, ...]:
        """All GPUs. One that cannot be read is given as last read, with `error` set, or not at all if it never was."""
        return tuple(gpu for device in self._devices if (gpu := self._read(device)) is not None)

    def close(self) -> None:
        with contextlib.suppress(*_ERRORS):
            _nvml.nvmlShutdown()

    def _read(self, device: _Device) -> Gpu | None:
        try:
            device.last, error = _read_device(device), None
        except _ERRORS as problem:
            error = str(problem)
            device.last = replace(device.last, error=error) if device.last is not None else None
        if error != device.error:
            device.error = error
            self._tell(device)
        return device.last

    def _tell(self, device: _Device) -> None:
        if device.error is None:
            self._log.info("gpu_readable_again", index=device.index)
        else:
            self._log.warning("gpu_unreadable", index=device.index, error=device.error)


def _devices() -> Iterator[_Device]:
    """All GPUs; a GPU in MIG mode as its MIG devices, which are all that CUDA then offers of it.

    A whole GPU keeps its NVML index, which with CUDA_DEVICE_ORDER=PCI_BUS_ID is CUDA's; MIG devices are counted on
    from the number of GPUs.
    """
    count = _nvml.nvmlDeviceGetCount()
    next_index = count
    for index in range(count):
        try:
            handle = _nvml.nvmlDeviceGetHandleByIndex(index)
            parts = _mig_handles(handle) if _is_partitioned(handle) else None
        except _ERRORS:  # one GPU must not hide the others; reading it will tell what is wrong
            handle, parts = None, None
        if parts is None:
            yield _Device(handle, index)
            continue
        for part in parts:
            yield _Device(part, next_index, parent=handle)
            next_index += 1


def _is_partitioned(handle: Any) -> bool:
    mode = _optional(_nvml.nvmlDeviceGetMigMode, handle)
    return mode is not None and mode[0] == _nvml.NVML_DEVICE_MIG_ENABLE


def _mig_handles(handle: Any) -> list[Any]:
    found: list[Any] = []
    for index in range(_optional(_nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        part = _optional(_nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if part is not None:
            found.append(part)
    return found


def _optional(query: Callable[..., Any], *arguments: Any) -> Any:
    """The value, or None where this GPU, driver or user cannot have it. Raises where the GPU is lost."""
    try:
        return query(*arguments)
    except _FATAL_TO_A_GPU:
        raise
    except _ERRORS:
        return None


def _read_device(device: _Device) -> Gpu:
    if device.handle is None:
        device.handle = _nvml.nvmlDeviceGetHandleByIndex(device.index)
    if device.fixed is None:
        device.fixed = _fixed(device)
    total, free, used, reserved = _memory(device.handle)
    board = device.parent or device.handle  # a MIG device has no sensors of its own
    power = _optional(_nvml.nvmlDeviceGetPowerUsage, board)
    limit = _optional(_nvml.nvmlDeviceGetEnforcedPowerLimit, board)
    rates = _optional(_nvml.nvmlDeviceGetUtilizationRates, device.handle)
    return replace(
        device.fixed,
        memory_total_bytes=total,
        memory_free_bytes=free,
        memory_used_bytes=used,
        memory_reserved_bytes=reserved,
        pcie_generation=_optional(_nvml.nvmlDeviceGetCurrPcieLinkGeneration, board),
        pcie_width=_optional(_nvml.nvmlDeviceGetCurrPcieLinkWidth, board),
        temperature_celsius=_optional(_nvml.nvmlDeviceGetTemperature, board, _nvml.NVML_TEMPERATURE_GPU),
        power_draw_watts=None if power is None else power / 1000,  # NVML tells milliwatts
        power_limit_watts=None if limit is None else limit / 1000,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        processes=_processes(device.handle),
    )


def _fixed(device: _Device) -> Gpu:
    handle, board = device.handle, device.parent or device.handle
    whole = device.parent is None
    megahertz = _optional(_nvml.nvmlDeviceGetMaxClockInfo, board, _nvml.NVML_CLOCK_MEM) if whole else None
    capability = _optional(_nvml.nvmlDeviceGetCudaComputeCapability, board)
    return Gpu(
        uuid=GpuUuid(_nvml.nvmlDeviceGetUUID(handle)),
        index=device.index,
        name=_nvml.nvmlDeviceGetName(handle),
        memory_total_bytes=0,
        memory_free_bytes=0,
        memory_used_bytes=0,
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        pcie_generation_max=_optional(_nvml.nvmlDeviceGetMaxPcieLinkGeneration, board),
        pcie_width_max=_optional(_nvml.nvmlDeviceGetMaxPcieLinkWidth, board),
        # A MIG device has a share of the bandwidth that NVML does not tell.
        memory_bus_width_bits=_optional(_nvml.nvmlDeviceGetMemoryBusWidth, board) if whole else None,
        memory_clock_hertz=None if megahertz is None else megahertz * _HERTZ_PER_MEGAHERTZ,
    )


def _memory(handle: Any) -> tuple[int, int, int, int | None]:
    """Total, free, used, reserved. Version 2 keeps what the driver reserves apart from what is used; 1 adds it in."""
    try:
        info = _nvml.nvmlDeviceGetMemoryInfo(handle, version=_nvml.nvmlMemory_v2)
        return info.total, info.free, info.used, info.reserved
    except _FATAL_TO_A_GPU:
        raise
    except _ERRORS:
        info = _nvml.nvmlDeviceGetMemoryInfo(handle)
        return info.total, info.free, info.used, None


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Compute and graphics processes by pid; one that is both is told twice, with the same memory."""
    found: dict[int, int | None] = {}
    for process in (*_list(handle, "Compute"), *_list(handle, "Graphics")):
        known = found.get(process.pid)
        used = process.usedGpuMemory
        found[process.pid] = used if known is None else max(known, used or 0)
    return tuple(GpuProcess(pid, used) for pid, used in sorted(found.items()))


def _list(handle: Any, kind: str) -> list[Any]:
    """Drivers before 510 have version 2 of the call only."""
    for version in ("v3", "v2"):
        found = _optional(getattr(_nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}"), handle)
        if found is not None:
            return found
    return []
