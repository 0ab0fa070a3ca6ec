"""The two closed unions of the deciding core: what can happen, and what it may ask for.

The engine turns the outside into events, calls the dispatcher, and carries the actions out. Nothing else passes
between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.balance import Choice
from router.core.entities import (
    BlobDigest,
    Gpu,
    InstanceName,
    InstanceSpec,
    InstanceState,
    LoadId,
    ModelFacts,
    RunnerOptions,
    Ticket,
    TicketId,
)
from router.core.learned import FootprintKey

# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One row of an instance's `/api/ps`."""

    name: str
    digest: str
    size_bytes: int
    size_vram_bytes: int
    context_length: int | None
    model: ModelFacts | None = None
    """Facts of that name where the catalog has them."""


@dataclass(frozen=True, slots=True)
class GpusRead:
    """The cards, read at `read_at` (the time *before* the reading began)."""

    gpus: tuple[Gpu, ...]
    read_at: float


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    spec: InstanceSpec
    state: InstanceState
    reason: str = ""
    version: str | None = None


@dataclass(frozen=True, slots=True)
class ResidencyRead:
    """An instance's `/api/ps`, asked for at `read_at`. Failed polls post nothing: unknown is not empty."""

    instance: InstanceName
    models: tuple[LoadedModel, ...]
    read_at: float


@dataclass(frozen=True, slots=True)
class Arrived:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client of a waiting ticket went away."""

    ticket_id: TicketId


@dataclass(frozen=True, slots=True)
class Released:
    """A granted slot comes back, however its request ended."""

    ticket_id: TicketId
    runner_lost: bool = False
    """The model's runner died under the request: what `/api/ps` still says of it is not to be trusted."""
    output_tokens: int = 0
    """As the server counted them; 0 where it did not tell."""
    first_byte_at: float | None = None
    """When the first byte of its answer came; None where none came, or nobody looked."""


@dataclass(frozen=True, slots=True)
class LoadFinished:
    load_id: LoadId
    size_bytes: int
    size_vram_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    load_id: LoadId
    status: int
    message: str
    is_lost: bool = False
    """Whether the server ended or could not be asked, instead of refusing."""


@dataclass(frozen=True, slots=True)
class UnloadFinished:
    instance: InstanceName
    blob: BlobDigest
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ModelKnown:
    """The facts of a model that shall be warm, whether or not anybody has asked for it yet."""

    model: ModelFacts


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """A client wants a model gone from every instance once its running requests end."""

    blob: BlobDigest
    even_pinned: bool = False
    """For a model that is deleted: what is pinned to stay warm leaves too."""


@dataclass(frozen=True, slots=True)
class FootprintsKnown:
    """Footprints that earlier runs have measured."""

    footprints: tuple[tuple[FootprintKey, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: deadlines, expiries."""


@dataclass(frozen=True, slots=True)
class ShutdownBegan:
    """No new work; what waits is rejected, what runs may end."""


Event = (
    GpusRead
    | InstanceChanged
    | ResidencyRead
    | Arrived
    | Cancelled
    | Released
    | LoadFinished
    | LoadFailed
    | UnloadFinished
    | UnloadAsked
    | ModelKnown
    | FootprintsKnown
    | Ticked
    | ShutdownBegan
)

# --- actions ----------------------------------------------------------------------------------------------


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
