"""What the scheduler may ask for: a closed union of actions, carried out by the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from router.domain.footprint import FootprintKey
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
    """Why its model is loaded there."""
    used: int
    """Slots that were in use already."""
    slots: int
    choice: Choice | None = None
    """Where there were several copies."""
    options: RunnerOptions = ()
    """The loaded copy's, to which a flexible request is adapted."""
    context_length: int = 0
    """The loaded copy's, in tokens of one slot."""

    @property
    def reason(self) -> str:
        """Put into words when it is read, which few are."""
        words = self.choice.words() if self.choice is not None else ""
        return f"{self.replica_reason}; {self.used} of {self.slots} slots were in use{words}"


@dataclass(frozen=True, slots=True)
class Reject:
    """The ticket ends in this error; `code` is one of `router.errors`' stable codes."""

    ticket_id: TicketId
    code: str
    message: str
    retry_after_seconds: int | None = None
    status: int | None = None
    """The server's own status where its words are passed on."""


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


@dataclass(frozen=True, slots=True)
class Unload:
    instance: InstanceName
    url: str
    model: ModelFacts
    blob: BlobDigest
    reason: str


@dataclass(frozen=True, slots=True)
class StartInstance:
    """One more server, over the GPUs of `spec`; its port and the rest of its environment are the starter's."""

    spec: InstanceSpec
    reason: str


@dataclass(frozen=True, slots=True)
class StopInstance:
    """An instance that was started on demand and is empty."""

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
    """A footprint was measured: keep it for later runs."""

    key: FootprintKey
    per_gpu_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadGpus:
    """Memory has changed by our own doing: read the GPUs now, not at the next turn."""


Action = Grant | Reject | Load | Unload | StartInstance | StopInstance | RestartInstance | Notice | Remember | ReadGpus
