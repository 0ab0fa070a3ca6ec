"""The frozen facts that one decision is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from router.domain.drained import NOTHING_DRAINED, Drained
from router.domain.engine_rules import EngineRules, EstimateOn
from router.domain.gpu import Gpu, GpuUuid
from router.domain.health import Health
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceView
from router.domain.lasting_memo import LastingMemo
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest
from router.domain.policy import Policy
from router.domain.request import RunnerOptions
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey
from router.domain.restart import RollingRestart


@dataclass(frozen=True, slots=True)
class Demand:
    """How often a model is requested and how long its requests take."""

    weight: float = 0.0
    """Number of requests, decayed to `at`."""
    at: float = 0.0
    """Time of the last request."""
    service_seconds: float | None = None
    """Mean time that a request holds a slot; None until the first one has ended."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A recent failed load; not retried there until it is dropped after `failure_memory_seconds`."""

    instance: InstanceName
    blob: BlobDigest
    options: RunnerOptions
    status: int
    message: str
    at: float
    is_lost: bool = False
    """True if the server exited or could not be reached; such a load is retried once. False if it refused the load."""
    is_spilled: bool = False
    """True if the load came out partly on the CPU and was undone; the model is planned once more, smaller or there."""


HealthKey = ResidencyKey | InstanceName
"""A replica or an instance."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a decision is made from. The mappings are read-only views that do not change during one decision."""

    now: float
    policy: Policy
    gpus: Mapping[GpuUuid, Gpu]
    gpus_read_at: float
    instances: Mapping[InstanceName, InstanceView]
    residencies: Mapping[ResidencyKey, Residency]
    reservations: Mapping[LoadId, Reservation]
    changed_at: float = float("-inf")
    """When a load or unload last ended: GPU readings may take a moment to show it."""
    changed_on: Mapping[GpuUuid, float] = field(default_factory=dict[GpuUuid, float])
    """The same for each GPU."""
    failures: tuple[Failure, ...] = ()
    draining: frozenset[ResidencyKey] = frozenset()
    """Residencies that take no new request because their room is needed."""
    demand: Mapping[BlobDigest, Demand] = field(default_factory=dict[BlobDigest, Demand])
    wanted: Mapping[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])
    """Number of waiting tickets by model."""
    large_model_requested: bool = False
    """True if a model that no single GPU holds was requested recently."""
    load_rate_bytes_per_second: float | None = None
    """Measured rate of recent loads; None before the first one."""
    loaded_bytes_per_second: float = 0.0
    """Recent mean of the weights loaded per second on the whole machine: how busy it is with swaps."""
    unasked_bytes_per_hour: float = 0.0
    """Weights of the loads of the last hour that nobody waited for."""
    host_free_bytes: int | None = None
    """Host memory that programs may still take; None where it is not read."""
    cpu_speeds: Mapping[BlobDigest, MeasuredSpeed] = field(default_factory=dict[BlobDigest, MeasuredSpeed])
    """Measured speeds on the instance for CPU overflow."""
    troubled: frozenset[frozenset[GpuUuid]] = frozenset()
    """Sets of GPUs on which an instance recently failed to start: no other instance is started there for now."""
    warm_missing: Mapping[str, str] = field(default_factory=dict[str, str])
    """Models with `keep_warm` that are not loaded, by name, each with the reason."""
    health: Mapping[HealthKey, Health] = field(default_factory=dict["HealthKey", Health])
    """Of replicas and instances that have failed requests lately."""
    ejected: frozenset[InstanceName] = frozenset()
    """Instances on which nothing is loaded now, because requests keep failing there."""
    drained: Drained = NOTHING_DRAINED
    """What an operator has taken out of service."""
    hot: frozenset[GpuUuid] = frozenset()
    """GPUs that are hot or slowed down: others are preferred."""
    probation: frozenset[GpuUuid] = frozenset()
    """GPUs that have just come back: they take one load at a time, each on it alone."""
    tested_in_sets: frozenset[GpuUuid] = frozenset()
    """Those of them that no known model fits on alone: the load is one over a set of GPUs."""
    restarts_due: Mapping[InstanceName, float] = field(default_factory=dict[InstanceName, float])
    """Instances that are drained to be restarted, each with when that ends."""
    rolling: RollingRestart | None = None
    """A restart that an operator requested and that is in progress."""
    engines: Mapping[str, EngineRules[Snapshot]] = field(
        default_factory=dict[str, "EngineRules[Snapshot]"], repr=False, compare=False
    )
    """The rules of the engines in use, by kind."""
    lasting: LastingMemo | None = field(default=None, repr=False, compare=False)
    """Results of earlier snapshots that still hold; None: nothing is remembered."""
    memo: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)
    """Values already computed from this snapshot (`domain/snapshot_index.py`)."""

    def promised(self) -> frozenset[ResidencyKey]:
        """Loaded models that planned loads will evict."""
        return frozenset(key for r in self.reservations.values() if r.sent_at is None for key in r.evict)


Engines = Mapping[str, EngineRules[Snapshot]]
"""The rules of the engines in use, by kind."""
Estimate = EstimateOn[Snapshot]
"""(model, instance, context in tokens, snapshot) -> bytes on each GPU of the instance, in its GPU order."""
