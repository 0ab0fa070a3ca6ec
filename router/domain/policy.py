"""Settings and constants of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceSpec


@dataclass(frozen=True, slots=True)
class Pin:
    """Settings of one model; None or empty: the router decides."""

    gpus: tuple[GpuUuid, ...] = ()
    """Use exactly these: one GPU, or several to spread over."""
    spread: bool = False
    """Use several GPUs even if one is enough."""
    cpu: bool = False
    context_length: int | None = None
    num_parallel: int | None = None
    kv_cache_type: str | None = None
    priority: int = 0
    replicas_max: int | None = None
    keep_warm: bool = False
    """Loaded at startup, loaded again if it is lost, and never evicted."""
    is_run_time: bool = False
    """Its GPUs, or that there are none, come from a command to the running router, not from the configuration."""


@dataclass(frozen=True, slots=True)
class SchedulerConstants:
    """Values that no operator sets: tuned in the simulator, measured, or given by the server's behaviour."""

    unseen_margin_ratio: float = 0.0
    """Safety margin until measured, as a ratio of the estimate: the error of the estimates. Set by
    `router/config/policy.py`; 0 keeps tests and simulations exact."""
    failure_memory_seconds: float = 60.0
    """How long a placement that failed or spilled is not retried for the same model: a retry would most likely fail
    again, and after a minute the GPUs have changed."""
    room_timeout_seconds: float = 15.0
    """How long freed VRAM may take to become visible before the load is planned again: a driver frees a large model
    within seconds, so after this something else uses the memory."""
    restart_drain_seconds: float = 60.0
    """How long running requests may delay the restart of a server that cannot unload a model: long enough for most
    responses, while everybody who needs its memory waits."""
    restart_grace_seconds: float = 60.0
    """How long requests wait for a server of ours that is down: a restart takes seconds, discovery of GPUs up to 30."""
    attached_grace_seconds: float = 5.0
    """The same for an attached server, whose restart is nobody's duty here: one or two health checks."""
    warm_discovery_seconds: float = 5.0
    """How long after the first server is ready other loads wait until the models with `keep_warm` are found: they would
    be evicted again. Finding them takes two queries."""
    settle_seconds: float = 3.0
    """After a load or unload no model is called too large for this long: the driver may still report old values."""
    drain_after_seconds: float = 75.0
    """After this wait busy models may be drained for a ticket. As long as starving, because a drain stops slots that
    serve other requests."""
    large_wait_share: float = 0.75
    """Share of both wait bounds for a model that no single GPU holds: its load takes longer, so it starts earlier."""
    instances_max: int = 64
    """Limit on the number of instances, against endless process starts; more than the sets of GPUs used on 8 GPUs."""
    load_fixed_seconds: float = 0.8
    """Part of a load's duration that does not depend on its size: unloading and starting a runner. Measured."""
    load_bytes_per_second: float = 3e9
    """Load rate until loads were observed: a model read from an NVMe disk or the page cache. Measured."""
    demand_half_life_seconds: float = 300.0
    """Half-life of a model's request rate: longer than pauses in a chat, shorter than a change of workload."""
    swap_budget_bytes_per_second: float = 9e8
    """Load rate of the whole machine below which loads count as few: all GPUs load through one disk and one bus."""
    swap_window_seconds: float = 60.0
    """Half-life of that load rate: a few loads of large models fit into it."""
    swap_ease_max: float = 4.0
    """Upper limit of how cheap loads become when they are few, so that an idle machine does not evict at any price."""
    slots_bonus_max: int = 1
    """Additional slots for a model over several GPUs if they fit: such a model is loaded rarely and decodes slowly, so
    its requests would otherwise queue for each other. More than one costs VRAM that other models need."""
    late_share: float = 1.0
    """Value of a ticket that can no longer meet its target, as a share of one that can, while loads are few: serving
    it soon still shortens its wait. Tuned in the simulator."""
    late_share_idle: float = 0.7
    """Lower limit of that share if nothing runs and no other request waits: holding the ticket back would help nobody.
    Below 1, so that a recently used model is not evicted for every late request."""
    away_seconds: float = 15.0
    """Assumed absence of an evicted model in addition to its load: higher means fewer swaps. Tuned in the simulator."""
    hold_seconds: float = 0.0
    """How long a ticket that can no longer meet its target waits before its wait counts. 0: holding back did not pay
    in the simulator."""
    wait_weight: float = 0.05
    """Value of a second of waiting, compared with the price of an eviction: higher means shorter waits and more swaps.
    Tuned in the simulator."""
    residency_seconds_min: float = 0.0
    """How long a loaded model is protected from eviction, except for starving tickets. 0: prices of evictions already
    prevent thrashing."""
    context_step_tokens: int = 4096
    """A context larger than the default is rounded up to a power of two times this, so that requests with similar
    `num_ctx` share one replica."""
    replicas_max: int = 8
    """Limit on replicas of a model without a rule of its own: one per GPU of the largest usual machine."""


@dataclass(frozen=True, slots=True)
class Rest:
    """When a large model is loaded that nobody waits for (`scheduler/placement/rest.py`)."""

    bytes_per_hour: float
    """At most so many bytes of weights an hour."""
    pause_seconds: float = 1.0
    """How long those that leave for it must have been unused."""
    weight: float = 4.0
    """The cost of its absence must exceed that of theirs times this."""


@dataclass(frozen=True, slots=True)
class CpuOverflow:
    """When a request is served on the CPU because the GPUs would be late (`scheduler/placement/cpu_overflow.py`)."""

    memory_margin_bytes: int = 4 * 1024**3
    """Host memory that stays free, besides what the files of the requested models need in the page cache."""
    tokens_per_second_min: float = 7.0
    """A model that is slower on the CPU is not used there: people read about as fast."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's settings that decisions use; built once from the configuration."""

    vram_margin_bytes: int = 512 * 1024**2
    queue_limit: int = 512
    queue_timeout_seconds: float = 300.0
    load_timeout_seconds: float = 600.0
    keep_alive_seconds: float = -1.0
    starving_after_seconds: float = 75.0
    """After this wait a ticket gets its place at any price."""
    instances_on_demand: bool = False
    """True if instances over any set of GPUs may be started, each for one model."""
    on_demand_like: InstanceSpec | None = None
    """Template of instances started on demand: slots, context, cache type."""
    instance_idle_seconds: float = 60.0
    """An instance started on demand is stopped after it has been empty for this long."""
    concurrent_loads_max: int = 4
    ttft_target_seconds: float = 10.0
    """Target for the time to the first token; also the unit of prices (`scheduler/placement/cost.py`)."""
    context_length: int = 8192
    """Default context in tokens of a slot, if the request asks for none."""
    pins: Mapping[str, Pin] = field(default_factory=dict[str, "Pin"])
    """Keyed by the shortest form of the model's name, with its tag."""
    exclusive_gpus: Mapping[GpuUuid, frozenset[str]] = field(default_factory=dict[GpuUuid, frozenset[str]])
    """GPUs that only these models may use."""
    rest: Rest | None = None
    """None: nothing is loaded in place of another model unless somebody waits for it."""
    cpu: CpuOverflow | None = None
    """None: nothing is served on the CPU unless it is pinned there."""
    constants: SchedulerConstants = SchedulerConstants()

    def keeps_warm(self, name: str) -> bool:
        """Returns True if the model has `keep_warm`: it is never evicted."""
        pin = self.pins.get(name)
        return pin is not None and pin.keep_warm

    @property
    def has_warm_pins(self) -> bool:
        return any(pin.keep_warm for pin in self.pins.values())
