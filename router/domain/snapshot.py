"""The frozen facts that one decision is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from router.domain.engine_rules import EngineRules, EstimateOn
from router.domain.gpu import Gpu, GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceView
from router.domain.model import BlobDigest
from router.domain.policy import Policy
from router.domain.request import RunnerOptions
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey


@dataclass(frozen=True, slots=True)
class Demand:
    """How much a model is asked for: a count that decays, and how long its requests take."""

    weight: float = 0.0
    at: float = 0.0
    service_seconds: float | None = None
    """Mean time that a request holds a slot."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A load that went wrong lately: not tried again there until it is forgotten."""

    instance: InstanceName
    blob: BlobDigest
    options: RunnerOptions
    status: int
    message: str
    at: float
    is_lost: bool = False
    """Whether the server ended or could not be asked, instead of refusing: such a load is sent there once more."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a decision is made from. The mappings are read-only views that hold still during one decision."""

    now: float
    policy: Policy
    gpus: Mapping[GpuUuid, Gpu]
    gpus_read_at: float
    instances: Mapping[InstanceName, InstanceView]
    residencies: Mapping[ResidencyKey, Residency]
    reservations: Mapping[LoadId, Reservation]
    changed_at: float = float("-inf")
    """When a load or unload last ended: memory may take a moment to show it."""
    failures: tuple[Failure, ...] = ()
    draining: frozenset[ResidencyKey] = frozenset()
    """Residencies that take no new request because their room is wanted."""
    demand: Mapping[BlobDigest, Demand] = field(default_factory=dict[BlobDigest, Demand])
    wanted: Mapping[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])
    """Models that tickets wait for, and how many."""
    large_model_requested: bool = False
    """Whether a model that no single GPU holds was asked for of late."""
    load_rate_bytes_per_second: float | None = None
    """What loads have shown of late."""
    loaded_bytes_per_second: float = 0.0
    """Weights sent for loading of late."""
    troubled: frozenset[frozenset[GpuUuid]] = frozenset()
    """Sets of GPUs on which an instance could not be started lately: no other is started there for now."""
    warm_missing: Mapping[str, str] = field(default_factory=dict[str, str])
    """Models with `keep_warm` that are not loaded, by name, each with the reason."""
    engines: Mapping[str, EngineRules[Snapshot]] = field(
        default_factory=dict[str, "EngineRules[Snapshot]"], repr=False, compare=False
    )
    """The rules of the engines in use, by kind."""
    memo: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)
    """What was worked out from it already (`domain/snapshot_index.py`)."""

    def promised(self) -> frozenset[ResidencyKey]:
        """Loaded models whose room is promised to a load that is planned."""
        return frozenset(key for r in self.reservations.values() if r.sent_at is None for key in r.evict)


Engines = Mapping[str, EngineRules[Snapshot]]
"""The rules of the engines in use, by kind."""
Estimate = EstimateOn[Snapshot]
"""(model, instance, context in tokens, snapshot) -> bytes on each GPU of the instance, in its GPU order."""
