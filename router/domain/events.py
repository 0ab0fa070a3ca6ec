"""The two closed unions of the deciding core: what can happen, and what it may ask for.

The engine turns the outside into events, calls the dispatcher, and carries the actions out. Nothing else passes
between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.footprint import FootprintKey
from router.domain.gpu import Gpu
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Ticket, TicketId


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
    """The GPUs, read at `read_at` (the time *before* the reading began)."""

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
    silent_seconds: float = 0.0
    """How long its replica had sent no byte to anybody when its client gave up; 0 where it ended otherwise."""


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
class ModelDiscovered:
    """The facts of a model that shall be warm, whether or not anybody has asked for it yet."""

    model: ModelFacts


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """A client wants a model gone from every instance once its running requests end."""

    blob: BlobDigest
    even_pinned: bool = False
    """For a model that is deleted: what is pinned to stay warm leaves too."""


@dataclass(frozen=True, slots=True)
class FootprintsLoaded:
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
    | UnloadRequested
    | ModelDiscovered
    | FootprintsLoaded
    | Ticked
    | ShutdownBegan
)
