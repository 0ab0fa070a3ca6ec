"""What the scheduler handles: a closed union of events.

The controller turns what it observes into events, calls the dispatcher, and carries out the actions that it returns
(`domain/actions.py`). They exchange nothing else. Times are seconds of the controller's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.drained import DrainTarget
from router.domain.footprint import GpuFootprint, MeasuredFootprint
from router.domain.gpu import Gpu
from router.domain.health import ReplyFailure
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model that an instance lists as loaded (Ollama: a row of `/api/ps`)."""

    name: str
    digest: str
    size_bytes: int
    size_vram_bytes: int
    context_length: int | None
    model: ModelFacts | None = None
    """Facts of the model, if the catalog has them."""


@dataclass(frozen=True, slots=True)
class GpusRead:
    """A reading of all GPUs. `read_at` is the time *before* the reading began."""

    gpus: tuple[Gpu, ...]
    read_at: float
    host_free_bytes: int | None = None
    """Host memory that programs may still take, page cache included; None where that is not read."""


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    """An instance has a new state."""

    spec: InstanceSpec
    state: InstanceState
    reason: str = ""
    version: str | None = None


@dataclass(frozen=True, slots=True)
class ResidencyRead:
    """The loaded models of an instance. `read_at` is the time before the request.

    A failed poll posts no event, because unknown is not empty.
    """

    instance: InstanceName
    models: tuple[LoadedModel, ...]
    read_at: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request wants a slot."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client of a waiting ticket went away."""

    ticket_id: TicketId


@dataclass(frozen=True, slots=True)
class Released:
    """A granted slot is free again, however its request ended."""

    ticket_id: TicketId
    runner_lost: bool = False
    """The model's runner died during the request, so the server may still list a model that is gone."""
    output_tokens: int = 0
    """As counted by the server; 0 if it did not report them."""
    first_byte_at: float | None = None
    """When the first byte of the response arrived; None if none did, or if it was not recorded."""
    silent_seconds: float = 0.0
    """How long its replica had sent no byte to anybody when its client gave up; 0 where it ended otherwise."""
    failure: ReplyFailure | None = None
    """How its server failed it; None if it did not, and where its client left."""


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """The server has loaded the model. Sizes are those that it reports."""

    load_id: LoadId
    size_bytes: int
    size_vram_bytes: int
    speed: MeasuredSpeed | None = None
    """Where the load had to measure it; None also if that failed."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The load ended with an error."""

    load_id: LoadId
    status: int
    """HTTP status of the server's error, or one chosen by the controller."""
    message: str
    is_lost: bool = False
    """True if the server exited or could not be reached; False if it refused the load."""
    is_memory_short: bool = False
    """Whether the GPUs had too little memory for it."""


@dataclass(frozen=True, slots=True)
class UnloadFinished:
    """The unload has ended; `error` is None if it succeeded."""

    instance: InstanceName
    blob: BlobDigest
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ModelDiscovered:
    """Facts of a model with `keep_warm`; it may not have been requested yet."""

    model: ModelFacts


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """A client wants a model unloaded from every instance when its running requests have ended."""

    blob: BlobDigest
    even_pinned: bool = False
    """Unload it even with `keep_warm`, because the model is being deleted."""


@dataclass(frozen=True, slots=True)
class LoadMeasured:
    """What a server's own output said of a load that has just come up; posted before the load's end is."""

    instance: InstanceName
    blob: BlobDigest
    gpus: tuple[GpuFootprint, ...]
    """Bytes by part on each GPU of the instance, in its order, without CUDA contexts."""


@dataclass(frozen=True, slots=True)
class FootprintsLoaded:
    """Footprints that earlier runs measured."""

    footprints: tuple[MeasuredFootprint, ...]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed: check deadlines and expiries."""


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """The operator's settings were reloaded."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """An operator takes something out of service, or brings it back."""

    target: DrainTarget
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """An operator wants instances restarted, one after the other."""

    instances: tuple[InstanceName, ...]
    drain_timeout_seconds: float
    """How long the running requests of each may take."""


@dataclass(frozen=True, slots=True)
class ShutdownBegan:
    """Accept no new work, reject waiting tickets, and let running requests end."""


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
    | LoadMeasured
    | FootprintsLoaded
    | Ticked
    | PolicyChanged
    | DrainRequested
    | RestartRequested
    | ShutdownBegan
)
