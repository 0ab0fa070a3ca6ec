"""The shared state of one simulated machine: clock, GPU memory, weight transfers and run statistics.

Servers and baselines write the statistics; `router.lab.simulator.metrics` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.domain.gpu import GpuUuid
from router.lab.simulator.gpus import GpuLedger
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.weight_transfer import WeightTransfers
from router.lab.simulator.world import World


@dataclass(slots=True, eq=False)
class ResidencySpan:
    """One model on one server, from the start of its load until its memory is freed. Times in seconds of the run."""

    server: str
    model: str
    bytes_by_gpu: Mapping[GpuUuid, int]
    host_bytes: int
    began_at: float
    ready_at: float | None = None
    ended_at: float | None = None


@dataclass(slots=True)
class RunStats:
    """Load counters, residency spans and annotations of one run."""

    loads: int = 0
    loaded_bytes: int = 0
    spilled_loads: int = 0
    """Loads that put part of a model on the CPU."""
    failed_loads: int = 0
    residency_spans: list[ResidencySpan] = field(default_factory=list[ResidencySpan])
    notes: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """(seconds, text): faults, marked in the picture."""


@dataclass(slots=True)
class Machine:
    """One simulated machine during one run."""

    timeline: Timeline
    world: World
    ledger: GpuLedger
    transfers: WeightTransfers
    stats: RunStats
    active_shares: Mapping[str, float] = field(default_factory=dict[str, float])
    """Model name -> share of its weights that one token reads; absent: 1.0."""
    last_allocation_id: int = 0

    def new_allocation_id(self) -> int:
        """Returns a new id for one runner's memory in the ledger."""
        self.last_allocation_id += 1
        return self.last_allocation_id
