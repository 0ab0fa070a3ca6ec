"""What the scheduler may ask for: a closed union of actions, carried out by the controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.domain.footprint import FootprintKey
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import RunnerOptions, TicketId
from router.scheduler.balancing.replica_scorer import Prospect


class Grant(NamedTuple):
    """The ticket has a slot of its model on this instance, until it is released."""

    ticket_id: TicketId
    instance: InstanceName
    url: str
    copy_reason: str
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
        return f"{self.copy_reason}; {self.used} of {self.slots} slots were in use{words}"


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
    """One more server, over the cards of `spec`; its port and the rest of its environment are the starter's."""

    spec: InstanceSpec
    reason: str


@dataclass(frozen=True, slots=True)
class StopInstance:
    """An instance that was started on demand and is empty."""

    instance: InstanceName
    reason: str


@dataclass(frozen=True, slots=True)
class Remember:
    """A footprint was measured: keep it for later runs."""

    key: FootprintKey
    per_gpu_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadGpus:
    """Memory has changed by our own doing: read the cards now, not at the next turn."""


Action = Grant | Reject | Load | Unload | StartInstance | StopInstance | Remember | ReadGpus


class Choice(NamedTuple):
    """One copy among others, and what is to be told of it; made into words only where somebody reads them."""

    chosen: int
    """Which of them."""
    prospects: tuple[Prospect, ...]
    seconds: tuple[float, ...]
    """Of waiting, expected of each: `waiting_seconds`."""
    prompt_tokens: int

    def words(self) -> str:
        """Why that one, as the end of a grant's reason; "" where there was no choice."""
        if len(self.prospects) == 1:
            return ""
        held = self.prompt_tokens - self.prospects[self.chosen].missing_tokens
        kept = f", {held} tokens of the prompt in its cache" if held else ""
        both = zip(self.seconds, self.prospects, strict=True)
        least, other = min(each for index, each in enumerate(both) if index != self.chosen)
        expected = f"about {self.seconds[self.chosen]:.2f} s of waiting{kept}"
        return f"; {expected}, and {least:.2f} s on {other.instance}"
