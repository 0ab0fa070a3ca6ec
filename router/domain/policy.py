"""What the operator has configured, as far as decisions use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceSpec


@dataclass(frozen=True, slots=True)
class Pin:
    """Where a model has to be, and how it is treated; None and empty: the router's choice."""

    gpus: tuple[GpuUuid, ...] = ()
    """One GPU, or several to spread over: exactly these."""
    spread: bool = False
    """Over several GPUs even where one would do."""
    cpu: bool = False
    context_length: int | None = None
    num_parallel: int | None = None
    kv_cache_type: str | None = None
    priority: int = 0
    replicas_max: int | None = None
    keep_warm: bool = False
    """Loaded at start and again when it is lost, and never unloaded to make room."""


@dataclass(frozen=True, slots=True)
class SchedulerConstants:
    """Figures that no operator sets: chosen by simulation or read from the server's source."""

    unseen_margin_ratio: float = 0.0
    """By so much more than its estimate a load is taken to need until one like it was measured."""
    failure_memory_seconds: float = 60.0
    """How long a placement that failed or spilled is not tried again for the same model."""
    room_timeout_seconds: float = 15.0
    """How long freed VRAM may take to show before the load is planned anew."""
    settle_seconds: float = 3.0
    """After a load or unload no model is called too large for so long: the driver may still show old figures."""
    drain_after_seconds: float = 75.0
    """A ticket that has waited so long for room may stop busy models from taking new requests."""
    large_wait_share: float = 0.75
    """A ticket for a model that no single GPU holds waits such a share of both: its load is long as well."""
    instances_max: int = 64
    load_fixed_seconds: float = 0.8
    """Unloading what stands in the way and starting a runner; part of the price of every load."""
    load_bytes_per_second: float = 3e9
    """Assumed until loads have been seen."""
    demand_half_life_seconds: float = 300.0
    swap_budget_bytes_per_second: float = 9e8
    """Bytes loaded a second by the whole machine below which loads count as few: one host reads for all GPUs."""
    swap_window_seconds: float = 60.0
    """Half-life of the memory of loads."""
    swap_ease_max: float = 4.0
    slots_bonus_max: int = 1
    """So many slots more than the tuning says does a model over several GPUs get, where they fit beside it."""
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
    context_step_tokens: int = 4096
    """A larger context than the default is loaded as the next power of two times this."""
    replicas_max: int = 8


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator sets, as far as decisions use it; built once from the settings."""

    vram_margin_bytes: int = 512 * 1024**2
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
    starving_after_seconds: float = 75.0
    """A ticket that has waited so long gets its place whatever that costs others."""
    instances_on_demand: bool = False
    """Whether instances over any set of GPUs may be started, each for one model."""
    on_demand_like: InstanceSpec | None = None
    """Slots, context and cache of an instance started on demand."""
    instance_idle_seconds: float = 60.0
    """An instance started on demand is stopped when it has been empty for so long."""
    concurrent_loads_max: int = 4
    ttft_target_seconds: float = 10.0
    """A first token should not take longer: who would miss that by waiting goes before what is merely cheap."""
    context_length: int = 8192
    """Tokens of context that an instance gives where nothing is asked for."""
    pins: Mapping[str, Pin] = field(default_factory=dict[str, "Pin"])
    """By the shortest form of a model's name, with its tag."""
    exclusive_gpus: Mapping[GpuUuid, frozenset[str]] = field(default_factory=dict[GpuUuid, frozenset[str]])
    """GPUs that only these models may use."""
    constants: SchedulerConstants = SchedulerConstants()
