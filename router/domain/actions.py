"""What the scheduler can request: a closed union of actions that the controller carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from router.domain.footprint import MeasuredFootprint
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.model import BlobDigest, ModelFacts
from router.domain.replica_choice import Choice
from router.domain.request import RunnerOptions, TicketId


class Grant(NamedTuple):
    """The ticket has a slot of its model on this instance, until it is released."""

    ticket_id: TicketId
    instance: InstanceName
    url: str
    replica_reason: str
    """Why the model was loaded there."""
    used: int
    """Slots in use before this grant."""
    slots: int
    choice: Choice | None = None
    """How the replica was chosen; None if there was only one."""
    options: RunnerOptions = ()
    """Options of the replica, to which a flexible request is adapted."""
    context_length: int = 0
    """Context of the replica in tokens per slot."""

    @property
    def reason(self) -> str:
        """Text for `X-Llamayard-Reason`; built only when it is read, because few are."""
        comparison = self.choice.explain() if self.choice is not None else ""
        return f"{self.replica_reason}; {self.used} of {self.slots} slots were in use{comparison}"


@dataclass(frozen=True, slots=True)
class Reject:
    """The ticket ends in this error; `code` is one of `router.errors`' stable codes."""

    ticket_id: TicketId
    code: str
    message: str
    retry_after_seconds: int | None = None
    status: int | None = None
    """HTTP status other than the code's: the server's where its error is passed on, 503 where it may be repeated."""


@dataclass(frozen=True, slots=True)
class Load:
    load_id: LoadId
    instance: InstanceName
    url: str
    model: ModelFacts
    options: RunnerOptions
    expects_gpu: bool
    timeout_seconds: float
    reason: str
    evicted: int = 0
    """How many models were unloaded for it."""
    measures_speed: bool = False
    """Whether a short answer is generated after the load, to learn how fast the model is there."""


class UnloadCause(StrEnum):
    """The kind of an unload's reason: a label of the metrics."""

    EVICTED = "evicted"
    """Its room is needed."""
    MOVED = "moved"
    """Its room is needed, and another replica of it serves or is coming."""
    RELOADED = "reloaded"
    """It is loaded again with other options."""
    EXPIRED = "expired"
    """Its keep_alive ended."""
    REQUESTED = "requested"
    """A client asked for it."""
    SPILLED = "spilled"
    """It came out partly on the CPU."""
    DRAINED = "drained"
    """An operator, or its health, takes its GPU or instance out of service."""
    RUNNER_LOST = "runner_lost"
    """Its runner died or hangs."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class AbortLoad:
    """Drop the request of a load that runs; its result is not awaited. The model is unloaded by the action after it."""

    load_id: LoadId
    instance: InstanceName
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    instance: InstanceName
    url: str
    model: ModelFacts
    blob: BlobDigest
    reason: str
    cause: UnloadCause = UnloadCause.OTHER


@dataclass(frozen=True, slots=True)
class StartInstance:
    """Start another server over the GPUs of `spec`. The supervisor chooses its port and adds the environment."""

    spec: InstanceSpec
    reason: str


@dataclass(frozen=True, slots=True)
class StopInstance:
    """Stop an instance that was started on demand and is empty."""

    instance: InstanceName
    reason: str


@dataclass(frozen=True, slots=True)
class RestartInstance:
    """Its server is stopped, with whatever it still runs; one that is not on demand is started again."""

    instance: InstanceName
    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the operator should know: a warning in the log."""

    event: str
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Remember:
    """Store a measured footprint for later runs."""

    footprint: MeasuredFootprint


@dataclass(frozen=True, slots=True)
class ReadGpus:
    """Read the GPUs now instead of at the next interval, because the router has changed their memory use."""


Action = (
    Grant
    | Reject
    | Load
    | AbortLoad
    | Unload
    | StartInstance
    | StopInstance
    | RestartInstance
    | Notice
    | Remember
    | ReadGpus
)
