"""The nouns of llamayard, as frozen values.

Everything that decides reads these and nothing else. All sizes are integer bytes, all durations and times
float seconds (times on whatever monotonic clock the caller uses: core never reads one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

from router.core.cards import Gpu, GpuProcess, GpuUuid, InstanceName, InstanceSpec, InstanceState, InstanceView

__all__ = [
    "NO_MODEL", "BlobDigest", "Demand", "Failure", "Footprint", "Gpu", "GpuProcess", "GpuUuid", "InstanceName",
    "InstanceSpec", "InstanceState", "InstanceView", "Layout", "LayoutKind", "LoadId", "ModelFacts", "Pin", "Policy",
    "Reservation", "Residency", "ResidencyKey", "ResidencyState", "RunnerOptions", "Snapshot", "TensorFacts", "Ticket",
    "TicketId",
]  # fmt: skip

BlobDigest = NewType("BlobDigest", str)
"""`sha256:…` of a weights file. Residency and slots belong to it, not to a model's name."""

TicketId = NewType("TicketId", int)
LoadId = NewType("LoadId", int)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Name, ggml type and shape of one tensor, from `/api/show`."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What decides a model's size and behaviour; read from `/api/tags` and `/api/show`."""

    name: str
    """Shortest form with its tag, e.g. `llama3.3:70b`, as `/api/tags` prints it."""
    digest: str
    """The manifest's digest."""
    blob: BlobDigest
    weights_bytes: int
    architecture: str
    layers: int
    embedding_length: int
    head_count: int
    head_count_kv: tuple[int, ...]
    """KV heads of each layer (one value per layer; layers without attention have 0)."""
    key_length: int
    value_length: int
    vocabulary_size: int
    context_length: int
    """The trained context in tokens; a larger asked one is cut to it."""
    sliding_window: int | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    """PARAMETER lines of the Modelfile that matter to a runner, sorted: `("num_ctx", "4096")`."""
    is_embedding: bool = False
    input_bytes: int | None = None
    """Token embedding table, which stays in host memory, where the tensor table told its size."""
    output_bytes: int | None = None
    """Output layer, which goes to the last card."""
    is_shared: bool = True
    """Whether the store that all spawned instances share holds it."""
    attached_on: frozenset[InstanceName] | None = None
    """Attached servers whose own store holds it; None: it is not known that any lacks it."""

    def is_on(self, spec: InstanceSpec) -> bool:
        """Whether the instance can load it."""
        if not spec.attached:
            return self.is_shared
        return self.attached_on is None or spec.name in self.attached_on


NO_MODEL = ModelFacts("", "", BlobDigest(""), 0, "", 0, 0, 0, (), 0, 0, 0, 0)
"""Stands where no facts are needed, as in tests of the books alone."""


RunnerOptions = tuple[tuple[str, int | bool], ...]
"""Options of a load that make Ollama start another runner when they differ, sorted by name."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model takes: bytes on each card of a placement, in the placement's card order."""

    per_gpu_bytes: tuple[int, ...]
    weights_bytes: int
    kv_cache_bytes: int
    compute_buffer_bytes: int
    cuda_context_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.per_gpu_bytes)


class ResidencyState(StrEnum):
    PLANNED = "planned"
    """Its room is reserved, and what stands in it is being unloaded."""
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Residency:
    """One model loaded (or on its way in or out) on one instance."""

    instance: InstanceName
    blob: BlobDigest
    name: str
    """The name it was loaded under; aliases share it."""
    options: RunnerOptions
    state: ResidencyState
    slots: int
    in_flight: int
    per_gpu_bytes: tuple[int, ...]
    """In the instance's card order; the estimate until a measurement replaces it."""
    context_length: int
    loaded_at: float
    used_at: float
    expires_at: float | None
    """When the router unloads it if idle; None: never by time. While UNLOADING: when a failed unload is sent again."""
    keep_alive_seconds: float = -1.0
    unloaded_at: float | None = None
    """When its unload ended; it is forgotten once the cards were read after that."""
    load_id: LoadId | None = None
    size_bytes: int = 0
    size_vram_bytes: int = 0
    reason: str = ""
    """Why it stands where it stands."""
    model: ModelFacts = NO_MODEL

    @property
    def is_idle(self) -> bool:
        return self.state is ResidencyState.READY and self.in_flight == 0


ResidencyKey = tuple[InstanceName, BlobDigest]


class LayoutKind(StrEnum):
    SINGLE = "single"
    """One card, whichever."""
    SPREAD = "spread"
    """Several cards."""
    GPU = "gpu"
    """One card, that one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a request insists on being served: sums differ between layouts, and so do answers to the same seed."""

    kind: LayoutKind
    gpu: GpuUuid | None = None

    def allows(self, gpus: tuple[GpuUuid, ...]) -> bool:
        """Whether an instance over these cards will do."""
        if self.kind is LayoutKind.SPREAD:
            return len(gpus) > 1
        return len(gpus) == 1 and (self.gpu is None or gpus[0] == self.gpu)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that wants a slot."""

    id: TicketId
    model: ModelFacts
    options: RunnerOptions
    """What the request says, its Modelfile's parameters included; defaults are left out."""
    context_length: int
    """Tokens of context asked for; 0: what the instance gives by default."""
    keep_alive_seconds: float | None
    """None: the request said nothing; negative: for ever; 0: unload when idle."""
    arrived_at: float
    deadline: float
    client: str = ""
    """Who asks, for fairness: a key, a user or an address."""
    session: str = ""
    """The conversation, whose earlier turns some copy may still hold in its cache."""
    priority: int = 0
    """Larger goes first."""
    prompt_tokens: int = 0
    """A guess from the size of the prompt's text."""
    output_tokens_max: int | None = None
    is_flexible: bool = False
    """A copy with other runner options will do if its context is large enough: the gateway adapts the request."""
    layout: Layout | None = None
    fingerprints: Callable[[], tuple[int, ...]] | None = field(default=None, compare=False, repr=False)
    """Works out those of its prompt where they are wanted (`core/affinity.py`); None for a prompt without."""
    request_id: str = ""
    """What the client calls its request, to be shown."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes set aside on all cards of a placement for a load under way; all of them or none."""

    load_id: LoadId
    instance: InstanceName
    blob: BlobDigest
    per_gpu_bytes: tuple[tuple[GpuUuid, int], ...]
    made_at: float
    sent_at: float | None = None
    """When the load was sent to the server; None while room is being made."""
    finished_at: float | None = None
    """When the load ended well; kept until a reading of the cards newer than that shows the bytes used."""
    evict: tuple[ResidencyKey, ...] = ()
    """What has to leave first; busy models among them take no new request and leave when they are idle."""
    cleared_at: float | None = None
    """When the last of those began to leave; the room has to show soon after."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Where a model has to be, and how it is treated; None and empty: the router's choice."""

    gpus: tuple[GpuUuid, ...] = ()
    """One card, or several to spread over: exactly these."""
    spread: bool = False
    """Over several cards even where one would do."""
    cpu: bool = False
    context_length: int | None = None
    num_parallel: int | None = None
    kv_cache_type: str | None = None
    priority: int = 0
    replicas_max: int | None = None
    keep_warm: bool = False
    """Loaded at start and again when it is lost, and never unloaded to make room."""


@dataclass(frozen=True, slots=True)
class Demand:
    """How much a model is asked for: a count that decays, and how long its requests take."""

    weight: float = 0.0
    at: float = 0.0
    service_seconds: float | None = None
    """Mean time that a request holds a slot."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything configurable that decisions use; built once from the settings."""

    vram_margin_bytes: int = 512 * 1024**2
    unseen_margin_ratio: float = 0.0
    """By so much more than its estimate a load is taken to need until one like it was measured."""
    single_slot_architectures: frozenset[str] = frozenset(
        {
            "mllama",
            "qwen3vl",
            "qwen3vlmoe",
            "qwen35",
            "qwen35moe",
            "qwen3next",
            "lfm2",
            "lfm2moe",
            "nemotron_h",
        }
    )
    """Families that Ollama serves one request at a time (server/sched.go, v0.24 and v0.33)."""
    queue_limit: int = 512
    queue_timeout_seconds: float = 300.0
    load_timeout_seconds: float = 600.0
    keep_alive_seconds: float = -1.0
    failure_memory_seconds: float = 60.0
    """How long a placement that failed or spilled is not tried again for the same model."""
    room_timeout_seconds: float = 15.0
    """How long freed VRAM may take to show before the load is planned anew."""
    settle_seconds: float = 3.0
    """After a load or unload no model is called too large for so long: the driver may still show old figures."""
    drain_after_seconds: float = 75.0
    """A ticket that has waited so long for room may stop busy models from taking new requests."""
    starving_after_seconds: float = 75.0
    """A ticket that has waited so long gets its place whatever that costs others."""
    large_wait_share: float = 0.75
    """A ticket for a model that no single card holds waits such a share of both: its load is long as well."""
    instances_on_demand: bool = False
    """Whether instances over any set of cards may be started, each for one model."""
    on_demand_like: InstanceSpec | None = None
    """Slots, context and cache of an instance started on demand."""
    instance_idle_seconds: float = 60.0
    """An instance started on demand is stopped when it has been empty for so long."""
    instances_max: int = 64
    load_fixed_seconds: float = 0.8
    """Unloading what stands in the way and starting a runner; part of the price of every load."""
    load_bytes_per_second: float = 3e9
    """Assumed until loads have been seen."""
    loads_at_once: int = 4
    demand_half_life_seconds: float = 300.0
    swap_budget_bytes_per_second: float = 9e8
    """Bytes loaded a second by the whole machine below which loads count as few: one host reads for all cards."""
    swap_window_seconds: float = 60.0
    """Half-life of the memory of loads."""
    swap_ease_max: float = 4.0
    slots_bonus_max: int = 1
    """So many slots more than the tuning says does a model over several cards get, where they fit beside it."""
    late_share: float = 1.0
    """What a ticket that can no longer be served in time is worth at once, as a share of one that can, while loads are
    few."""
    late_share_idle: float = 0.7
    """The same, at least, where nothing runs and nobody else waits, however many loads there were of late."""
    away_seconds: float = 15.0
    """How long a model that was evicted is assumed to stay away, beside its load: more means fewer swaps."""
    hold_seconds: float = 0.0
    """A ticket that cannot be served in time any more waits so long before its waiting counts."""
    wait_weight: float = 0.05
    """What a second of waiting counts for against what an eviction costs: more means shorter waits and more swaps."""
    residency_seconds_min: float = 0.0
    """A model that was loaded is not unloaded for another one's sake sooner, unless that one has waited for long."""
    patience_seconds: float = 10.0
    """A first token should not take longer: who would miss that by waiting goes before what is merely cheap."""
    context_length: int = 8192
    """Tokens of context that an instance gives where nothing is asked for."""
    context_step_tokens: int = 4096
    """A larger context than the default is loaded as the next power of two times this."""
    replicas_max: int = 8
    pins: Mapping[str, Pin] = field(default_factory=dict[str, "Pin"])
    """By the shortest form of a model's name, with its tag."""
    exclusive_gpus: Mapping[GpuUuid, frozenset[str]] = field(default_factory=dict[GpuUuid, frozenset[str]])
    """Cards that only these models may use."""


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
    large_asked: bool = False
    """Whether a model that no single card holds was asked for of late."""
    load_rate_bytes_per_second: float | None = None
    """What loads have shown of late."""
    loaded_bytes_per_second: float = 0.0
    """Weights sent for loading of late."""
    troubled: frozenset[frozenset[GpuUuid]] = frozenset()
    """Sets of cards on which an instance could not be started lately: no other is started there for now."""
    worked_out: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)
    """What was worked out from it already (`core/sums.py`)."""

    def promised(self) -> frozenset[ResidencyKey]:
        """Loaded models whose room is promised to a load that is planned."""
        return frozenset(key for r in self.reservations.values() if r.sent_at is None for key in r.evict)
