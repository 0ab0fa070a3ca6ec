"""The shared state of one simulated machine: clock, GPU memory, weight transfers and run statistics.

Servers and baselines write the statistics; `router.lab.simulator.metrics` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator.gpus import GpuLedger
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.true_footprint import LoadShape, chance, cuda_context_bytes, deviation
from router.lab.simulator.weight_transfer import WeightTransfers
from router.lab.simulator.world import World, unload_seconds


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
    seed: int | None = None
    """Of what no router can know: how far loads deviate from their usual size, and slow memory recovery. None: both
    are off."""
    last_allocation_id: int = 0
    load_counts: dict[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])
    """Attempts to load each model."""

    def new_allocation_id(self) -> int:
        """Returns a new id for one runner's memory in the ledger."""
        self.last_allocation_id += 1
        return self.last_allocation_id

    def shape_of_load(self, model: ModelFacts, shape: LoadShape, uuids: Iterable[GpuUuid]) -> LoadShape:
        """The shape of one load on GPUs among these: with its deviation and their CUDA context."""
        capability = max((self.ledger.by_uuid[uuid].compute_capability for uuid in uuids), default=(0, 0))
        shape = replace(shape, cuda_context_bytes=cuda_context_bytes(capability))
        if self.seed is None:
            return shape
        self.load_counts[model.blob] = count = self.load_counts.get(model.blob, 0) + 1
        return replace(shape, size_ratio=deviation(self.seed, model, count))

    def unload_seconds(self, version: tuple[int, ...], allocation_id: int) -> float:
        """Time from the unload of a runner until its server goes on."""
        number = 1.0 if self.seed is None else chance(self.seed, f"unload {allocation_id}")
        return unload_seconds(self.world, version, number)
