"""One GPU as last read. Sizes are integer bytes; a value that the device or driver does not support is None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

GpuUuid = NewType("GpuUuid", str)
"""A GPU's NVML UUID, e.g. `GPU-8a0c…`; stable over reboots and re-cabling, unlike its index."""


def memory_bandwidth(clock_hertz: int, bus_width_bits: int) -> float:
    """Bytes per second in theory: two transfers per clock (DDR) over the full bus width."""
    return 2.0 * clock_hertz * bus_width_bits / 8


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process that holds memory on a GPU, as reported by NVML."""

    pid: int
    used_bytes: int | None
    server_ports: tuple[int, ...] = ()
    """TCP ports that it or an ancestor listens on; () where that cannot be told."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as last read. A value that the GPU or driver does not support is None, never zero."""

    uuid: GpuUuid
    index: int
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    memory_used_bytes: int
    memory_reserved_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    temperature_celsius: int | None = None
    power_draw_watts: float | None = None
    power_limit_watts: float | None = None
    utilization_ratio: float | None = None
    memory_bus_width_bits: int | None = None
    memory_clock_hertz: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    throttle_reasons: tuple[str, ...] = ()
    """Why its clocks are lower than requested, in NVML's words: `sw_power_cap`, `hw_thermal_slowdown`, …"""
    ecc_errors_uncorrected: int | None = None
    """Since the driver was loaded."""
    xids: tuple[int, ...] = ()
    """XID errors since the reading before."""
    error: str | None = None
    """Why the GPU could not be read ("GPU is lost"); its memory figures are then the last ones read."""

    @property
    def bandwidth_bytes_per_second(self) -> float | None:
        """Theoretical memory bandwidth."""
        if self.memory_bus_width_bits is None or self.memory_clock_hertz is None:
            return None
        return memory_bandwidth(self.memory_clock_hertz, self.memory_bus_width_bits)

    @property
    def link_bytes_per_second(self) -> float | None:
        """Maximum rate of the PCIe link: 250 MB/s per lane in generation 1, doubled by each later generation."""
        if self.pcie_generation_max is None or self.pcie_width_max is None:
            return None
        return 0.25e9 * 2.0 ** (self.pcie_generation_max - 1) * self.pcie_width_max


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """Settings and error counts of one GPU that placement does not need. None: the GPU or driver has no such value."""

    persistence_mode: bool | None = None
    ecc_mode: bool | None = None
    """Whether ECC is on."""
    ecc_mode_pending: bool | None = None
    """Whether it will be on after the next reboot."""
    ecc_uncorrected_errors: int | None = None
    """Since the driver was loaded."""
    row_remap_failed: bool | None = None
    """True if a broken row of the memory could not be replaced: the board is defective."""
