"""What all servers of a simulated machine share: time, GPUs, loads under way, and a record of what happened.

It decides nothing; servers and contestants write into the record, the report reads it.
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
    """One model on one server, from the start of its load until its memory was free again."""

    server: str
    model: str
    bytes_by_gpu: Mapping[GpuUuid, int]
    host_bytes: int
    began_at: float
    ready_at: float | None = None
    ended_at: float | None = None


@dataclass(slots=True)
class RunStats:
    """Counts and stays of one run."""

    loads: int = 0
    loaded_bytes: int = 0
    spilled_loads: int = 0
    """Loads that put a part of the model on the CPU."""
    failed_loads: int = 0
    residency_spans: list[ResidencySpan] = field(default_factory=list[ResidencySpan])
    notes: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """Faults and other things worth a mark in the picture."""


@dataclass(slots=True)
class Machine:
    """One machine in one run."""

    timeline: Timeline
    world: World
    ledger: GpuLedger
    transfers: WeightTransfers
    stats: RunStats
    active_shares: Mapping[str, float] = field(default_factory=dict[str, float])
    """Name of a model -> share of its weights that a token uses; absent: all of them."""
    last_allocation_id: int = 0

    def new_allocation_id(self) -> int:
        """A number for one runner's memory."""
        self.last_allocation_id += 1
        return self.last_allocation_id
