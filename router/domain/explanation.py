"""What would become of a request now, with every place that was considered: for people. Nothing depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest
from router.domain.request import RunnerOptions
from router.domain.residency import ResidencyKey


class Outcome(StrEnum):
    """What happens to the request at once."""

    SERVE = "serve"
    """It gets a slot."""
    LOAD = "load"
    """Its model is loaded, perhaps after others have left."""
    WAIT = "wait"
    """It waits for a slot, or for a place."""
    REFUSE = "refuse"
    """It gets an error."""


class Verdict(StrEnum):
    """What a candidate for a load is worth now."""

    FREE = "free"
    """There is room."""
    EVICT = "evict"
    """There is room once idle models have left, and that is worth it."""
    TOO_DEAR = "too dear"
    """The same, but others would lose more than the request gains so far."""
    BUSY = "busy"
    """Models with running requests are in the way."""
    BLOCKED = "blocked"
    HAS_MODEL = "has model"
    NOT_READY = "not ready"
    LARGER = "larger"
    """A smaller set of GPUs can hold the model."""
    TOO_SMALL = "too small"
    """Even empty it could not hold the model."""
    FAILED = "failed"
    """A load of the model failed there recently."""
    EXCLUDED = "excluded"
    """Pins, exclusive GPUs or the request's layout forbid it."""


@dataclass(frozen=True, slots=True)
class CandidateReport:
    """One set of GPUs with the instance that would load the model there."""

    instance: InstanceName
    gpus: tuple[GpuUuid, ...]
    verdict: Verdict
    reason: str
    is_new: bool = False
    """Whether the instance has to be started first."""
    per_gpu_bytes: tuple[int, ...] = ()
    """What the load would take, in the order of `gpus`."""
    evict: tuple[ResidencyKey, ...] = ()
    price_seconds: float | None = None
    """Seconds that others would lose; None where nothing can be offered."""
    slots: int | None = None
    """Requests that it would serve at a time; None where that was not asked."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A model that would leave."""

    name: str
    instance: InstanceName
    blob: BlobDigest
    in_flight: int
    price_seconds: float
    moves_to: InstanceName | None = None
    """Where it would be loaded meanwhile; None: it is only unloaded."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica of the model, loaded or coming."""

    instance: InstanceName
    state: str
    in_flight: int
    slots: int
    context_length: int
    serves: bool
    """Whether it can serve the request without a reload."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision and what led to it."""

    outcome: Outcome
    reason: str
    instance: InstanceName | None = None
    gpus: tuple[GpuUuid, ...] = ()
    options: RunnerOptions = ()
    """With which the model is, or would be, loaded."""
    position: int = 0
    """In the queue; 0: it does not wait for others."""
    expected_wait_seconds: float | None = None
    """Until it has a slot; None if unknown."""
    load_seconds: float | None = None
    """Of the load alone, where there is one."""
    worth_seconds: float | None = None
    """What others may lose for it at most; None: nothing was searched, or no limit."""
    error_code: str | None = None
    leaving: tuple[Leaving, ...] = ()
    replicas: tuple[ReplicaReport, ...] = ()
    candidates: tuple[CandidateReport, ...] = ()
