"""The nouns below the models: cards, and the servers on them, as frozen values.

Sizes are integer bytes; a value that a card or its driver does not support is None, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

GpuUuid = NewType("GpuUuid", str)
"""A card's NVML UUID, e.g. `GPU-8a0c…`; stable over reboots and re-cabling, unlike its index."""

InstanceName = NewType("InstanceName", str)
"""`gpu0`, `gpu1`, …, `spread`, `cpu`, or the name given by hand."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process that holds memory on a card, as NVML tells it."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card as last read. A value that the card or driver does not support is None, never zero."""

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
    error: str | None = None
    """Why the card could not be read ("GPU is lost"); memory figures are then the last known ones."""

    @property
    def bandwidth_bytes_per_second(self) -> float | None:
        """Theoretical memory bandwidth: two transfers a clock (DDR) over the bus's whole width."""
        if self.memory_bus_width_bits is None or self.memory_clock_hertz is None:
            return None
        return 2.0 * self.memory_clock_hertz * self.memory_bus_width_bits / 8

    @property
    def link_bytes_per_second(self) -> float | None:
        """What the PCIe link gives at most: 250 MB/s a lane in the first generation, about twice that in each next."""
        if self.pcie_generation_max is None or self.pcie_width_max is None:
            return None
        return 0.25e9 * 2.0 ** (self.pcie_generation_max - 1) * self.pcie_width_max


class InstanceState(StrEnum):
    """Where a supervised server is in its life; moved only by the table in `core/lifecycle.py`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One `ollama serve` as it shall be: what it sees, where it listens, what it may do at once."""

    name: InstanceName
    gpus: tuple[GpuUuid, ...]
    """Cards in the order of preference given to the server; empty for one that runs on the CPU."""
    url: str
    """`http://127.0.0.1:PORT`, no path."""
    num_parallel: int = 2
    context_length: int = 8192
    kv_cache_type: str = "f16"
    flash_attention: bool | None = None
    """None: the server's own choice ("auto")."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Whole extra environment of a spawned server; empty for an attached one."""
    attached: bool = False
    """True where somebody else runs the server; the router then only uses it."""
    on_demand: bool = False
    """True where the dispatcher asked for it; it is stopped when it has been empty for a while."""

    @property
    def is_spread(self) -> bool:
        return len(self.gpus) > 1


@dataclass(frozen=True, slots=True)
class InstanceView:
    """What the deciding functions may know of an instance."""

    spec: InstanceSpec
    state: InstanceState
    version: str | None = None
    reason: str = ""
