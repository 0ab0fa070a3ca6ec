"""Reads NVIDIA GPUs through NVML. The only module that imports `pynvml` (package `nvidia-ml-py`).

Blocking, for one thread at a time: run it in a `GpuPoller`. Changes no GPU setting. Source: NVML API reference, device
queries and multi-instance GPU management.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pynvml  # pyright: ignore[reportMissingTypeStubs] (there are none)
import structlog

from router.domain.gpu import Gpu, GpuHealth, GpuProcess, GpuUuid

_nvml: Any = pynvml

_GPU_LOST_ERRORS: tuple[type[Exception], ...] = (
    _nvml.NVMLError_GpuIsLost,
    _nvml.NVMLError_ResetRequired,
    _nvml.NVMLError_DriverNotLoaded,
    _nvml.NVMLError_Uninitialized,
)
"""Errors after which no value of the GPU can be trusted. Any other error makes only one value unavailable."""

_ERRORS: tuple[type[Exception], ...] = (_nvml.NVMLError, _nvml.NVMLLibraryMismatchError)
_HERTZ_PER_MEGAHERTZ = 1_000_000
_THROTTLE_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
"""NVML API reference, clocks event reasons; the others, such as an idle GPU, are no trouble."""


@dataclass(frozen=True, slots=True)
class NoGpus:
    """No GPU can be read; `reason` says why."""

    reason: str


@dataclass(slots=True)
class _Device:
    """A GPU or MIG device with its constant properties and its last reading."""

    handle: Any | None
    """None while the driver does not return one, as for a GPU that was lost before the router started."""
    index: int
    parent: Any | None = None
    """The handle of the whole GPU if this is a MIG device."""
    constant: Gpu | None = None
    """Everything that cannot change; its memory fields are 0."""
    last: Gpu | None = None
    xids: list[int] = field(default_factory=list[int])
    """XID errors that were reported since the last reading."""
    error: str | None = None


def open_nvml() -> NvmlReader | NoGpus:
    """Returns a reader of all GPUs, or the reason why there is none: no driver, a driver error or no GPU."""
    try:
        _nvml.nvmlInit()
    except _nvml.NVMLError_LibraryNotFound:
        return NoGpus("no NVIDIA driver is installed (libnvidia-ml.so.1 was not found)")
    except _ERRORS as error:
        return NoGpus(f"the NVIDIA driver does not answer: {error}")
    try:
        devices = list(_devices())
    except _ERRORS as error:
        _nvml.nvmlShutdown()
        return NoGpus(f"the NVIDIA driver cannot list the GPUs: {error}")
    reader = NvmlReader(devices)
    if not devices:
        reader.close()
        return NoGpus("the NVIDIA driver is installed, but it found no GPU")
    return reader


class NvmlReader:
    """A `GpuReader` of NVIDIA GPUs, made by `open_nvml`."""

    def __init__(self, devices: list[_Device]) -> None:
        self._devices = devices
        self._events = _xid_events(devices)
        """None if the driver or the GPUs report no XIDs."""
        self._log = structlog.get_logger("router.gpu.nvml")

    def read(self) -> tuple[Gpu, ...]:
        """Reads all GPUs. An unreadable GPU keeps its last values with `error` set; if never read, it is left out."""
        self._collect_xids()
        return tuple(gpu for device in self._devices if (gpu := self._read(device)) is not None)

    def _collect_xids(self) -> None:
        """Takes the XID errors since the last call, without waiting."""
        while self._events is not None:
            try:
                event = _nvml.nvmlEventSetWait_v2(self._events, 0)
            except _ERRORS:  # most often a timeout: there is none
                return
            for device in self._devices:
                if _address(device.parent or device.handle) == _address(event.device):
                    device.xids.append(int(event.eventData))

    def health(self) -> dict[GpuUuid, GpuHealth]:
        """Reads settings and error counts of all GPUs that `read` has read."""
        found: dict[GpuUuid, GpuHealth] = {}
        for device in self._devices:
            if device.last is not None:
                with contextlib.suppress(*_GPU_LOST_ERRORS):
                    found[device.last.uuid] = _read_health(device.parent or device.handle)
        return found

    def driver_version(self) -> str | None:
        """Such as `570.133.20`; None if the driver does not tell it."""
        return _optional(_nvml.nvmlSystemGetDriverVersion)

    def close(self) -> None:
        with contextlib.suppress(*_ERRORS):
            _nvml.nvmlShutdown()

    def _read(self, device: _Device) -> Gpu | None:
        xids, device.xids = tuple(device.xids), []
        try:
            device.last, error = replace(_read_device(device), xids=xids), None
        except _ERRORS as problem:
            error = str(problem)
            device.last = replace(device.last, error=error, xids=xids) if device.last is not None else None
        if error != device.error:
            device.error = error
            self._log_error_change(device)
        return device.last

    def _log_error_change(self, device: _Device) -> None:
        if device.error is None:
            self._log.info("gpu_readable_again", index=device.index)
        else:
            self._log.warning("gpu_unreadable", index=device.index, error=device.error)


def _devices() -> Iterator[_Device]:
    """Yields all GPUs; a GPU in MIG mode as its MIG devices, because CUDA then offers only those.

    A whole GPU keeps its NVML index, which is CUDA's index under CUDA_DEVICE_ORDER=PCI_BUS_ID. MIG devices get the
    indexes after the last GPU's.
    """
    count = _nvml.nvmlDeviceGetCount()
    next_index = count
    for index in range(count):
        try:
            handle = _nvml.nvmlDeviceGetHandleByIndex(index)
            mig_handles = _mig_handles(handle) if _is_in_mig_mode(handle) else None
        except _ERRORS:  # one bad GPU must not hide the others; reading it reports the error
            handle, mig_handles = None, None
        if mig_handles is None:
            yield _Device(handle, index)
            continue
        for mig_handle in mig_handles:
            yield _Device(mig_handle, next_index, parent=handle)
            next_index += 1


def _is_in_mig_mode(handle: Any) -> bool:
    mode = _optional(_nvml.nvmlDeviceGetMigMode, handle)
    return mode is not None and mode[0] == _nvml.NVML_DEVICE_MIG_ENABLE


def _mig_handles(handle: Any) -> list[Any]:
    handles: list[Any] = []
    for index in range(_optional(_nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        mig_handle = _optional(_nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if mig_handle is not None:
            handles.append(mig_handle)
    return handles


def _optional(query: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the value, or None if this GPU, driver or user cannot have it. Raises if the GPU is lost."""
    try:
        return query(*arguments)
    except _GPU_LOST_ERRORS:
        raise
    except _ERRORS:
        return None


def _read_device(device: _Device) -> Gpu:
    if device.handle is None:
        device.handle = _nvml.nvmlDeviceGetHandleByIndex(device.index)
    if device.constant is None:
        device.constant = _read_constant(device)
    total, free, used, reserved = _memory(device.handle)
    board = device.parent or device.handle  # a MIG device has no sensors of its own
    power = _optional(_nvml.nvmlDeviceGetPowerUsage, board)
    limit = _optional(_nvml.nvmlDeviceGetEnforcedPowerLimit, board)
    rates = _optional(_nvml.nvmlDeviceGetUtilizationRates, device.handle)
    return replace(
        device.constant,
        memory_total_bytes=total,
        memory_free_bytes=free,
        memory_used_bytes=used,
        memory_reserved_bytes=reserved,
        pcie_generation=_optional(_nvml.nvmlDeviceGetCurrPcieLinkGeneration, board),
        pcie_width=_optional(_nvml.nvmlDeviceGetCurrPcieLinkWidth, board),
        temperature_celsius=_optional(_nvml.nvmlDeviceGetTemperature, board, _nvml.NVML_TEMPERATURE_GPU),
        power_draw_watts=None if power is None else power / 1000,  # NVML reports milliwatts
        power_limit_watts=None if limit is None else limit / 1000,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        throttle_reasons=_throttle_reasons(board),
        ecc_errors_uncorrected=_optional(
            _nvml.nvmlDeviceGetTotalEccErrors,
            board,
            _nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            _nvml.NVML_VOLATILE_ECC,
        ),
        processes=_processes(device.handle),
    )


def _address(handle: Any | None) -> int | None:
    """Identifies the GPU of a handle, also of one that is lost."""
    return None if handle is None else ctypes.cast(handle, ctypes.c_void_p).value


def _throttle_reasons(board: Any) -> tuple[str, ...]:
    bits = _optional(_nvml.nvmlDeviceGetCurrentClocksThrottleReasons, board) or 0
    return tuple(name for bit, name in _THROTTLE_REASONS.items() if bits & bit)


def _xid_events(devices: list[_Device]) -> Any | None:
    """An event set that receives the XID errors of all GPUs that report them."""
    try:
        events = _nvml.nvmlEventSetCreate()
    except _ERRORS:
        return None
    for device in devices:
        board = device.parent or device.handle
        if board is not None:
            with contextlib.suppress(*_ERRORS):
                _nvml.nvmlDeviceRegisterEvents(board, _nvml.nvmlEventTypeXidCriticalError, events)
    return events


def _read_constant(device: _Device) -> Gpu:
    handle, board = device.handle, device.parent or device.handle
    is_whole_gpu = device.parent is None
    megahertz = _optional(_nvml.nvmlDeviceGetMaxClockInfo, board, _nvml.NVML_CLOCK_MEM) if is_whole_gpu else None
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
        # A MIG device has a share of the bandwidth, which NVML does not report.
        memory_bus_width_bits=_optional(_nvml.nvmlDeviceGetMemoryBusWidth, board) if is_whole_gpu else None,
        memory_clock_hertz=None if megahertz is None else megahertz * _HERTZ_PER_MEGAHERTZ,
    )


def _read_health(board: Any) -> GpuHealth:
    persistence = _optional(_nvml.nvmlDeviceGetPersistenceMode, board)
    ecc = _optional(_nvml.nvmlDeviceGetEccMode, board)  # current and pending
    errors = _optional(
        _nvml.nvmlDeviceGetTotalEccErrors, board, _nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, _nvml.NVML_VOLATILE_ECC
    )
    rows = _optional(_nvml.nvmlDeviceGetRemappedRows, board)  # corrected, uncorrected, pending, failed
    return GpuHealth(
        persistence_mode=None if persistence is None else bool(persistence),
        ecc_mode=None if ecc is None else bool(ecc[0]),
        ecc_mode_pending=None if ecc is None else bool(ecc[1]),
        ecc_uncorrected_errors=errors,
        row_remap_failed=None if rows is None else bool(rows[3]),
    )


def _memory(handle: Any) -> tuple[int, int, int, int | None]:
    """Returns total, free, used and reserved bytes.

    Version 2 of the call reports what the driver reserves separately; version 1 counts it as used.
    """
    try:
        info = _nvml.nvmlDeviceGetMemoryInfo(handle, version=_nvml.nvmlMemory_v2)
        return info.total, info.free, info.used, info.reserved
    except _GPU_LOST_ERRORS:
        raise
    except _ERRORS:
        info = _nvml.nvmlDeviceGetMemoryInfo(handle)
        return info.total, info.free, info.used, None


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Returns compute and graphics processes by pid. NVML lists one that is both twice, with the same memory."""
    used_by_pid: dict[int, int | None] = {}
    for process in (*_running_processes(handle, "Compute"), *_running_processes(handle, "Graphics")):
        previous = used_by_pid.get(process.pid)
        used = process.usedGpuMemory
        used_by_pid[process.pid] = used if previous is None else max(previous, used or 0)
    return tuple(GpuProcess(pid, used) for pid, used in sorted(used_by_pid.items()))


def _running_processes(handle: Any, kind: str) -> list[Any]:
    """Calls version 3, or version 2 for drivers before 510."""
    for version in ("v3", "v2"):
        processes = _optional(getattr(_nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}"), handle)
        if processes is not None:
            return processes
    return []
