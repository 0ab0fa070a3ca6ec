"""Converts the settings into the scheduler's policy.

GPUs are given by UUID, the beginning of one, or index, and must exist; model names are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.config.schema import ModelSettings
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceSpec
from router.domain.model_names import ANY_MODEL, shortest
from router.domain.policy import CpuOverflow, Pin, Policy, Rest, SchedulerConstants

UNSEEN_MARGIN_RATIO = 0.02
"""Estimates were within 2 % of the measured size of a 70B (tests/engines/ollama/test_memory_estimate.py)."""


def policy_of(settings: Settings, gpus: Sequence[Gpu], like: InstanceSpec) -> Policy:
    """The scheduler's policy. `like`: options of instances that are started on demand.

    Raises:
        ConfigError: a pin names a GPU that does not exist or an invalid model name, or rules contradict each other.
    """
    placement = settings.placement
    pins = {_name(name): _pin(name, rules, gpus) for name, rules in settings.models.items() if name != ANY_MODEL}
    exclusive = _exclusive_gpus(settings, gpus)
    return Policy(
        vram_margin_bytes=placement.vram_margin_bytes,
        queue_limit=settings.queue.limit,
        queue_timeout_seconds=settings.queue.timeout_seconds,
        load_timeout_seconds=settings.ollama.load_timeout_seconds,
        keep_alive_seconds=settings.ollama.keep_alive,
        instances_on_demand=placement.on_demand and settings.discovers and bool(gpus),
        on_demand_like=like,
        instance_idle_seconds=placement.instance_idle_seconds,
        ttft_target_seconds=placement.ttft_target_seconds,
        starving_after_seconds=placement.starving_after_seconds,
        concurrent_loads_max=placement.concurrent_loads_max,
        context_length=settings.ollama.context_length,
        pins=pins,
        exclusive_gpus=exclusive,
        rest=_rest(settings),
        cpu=_cpu(settings),
        constants=SchedulerConstants(unseen_margin_ratio=UNSEEN_MARGIN_RATIO),
    )


def _cpu(settings: Settings) -> CpuOverflow | None:
    placement = settings.placement
    return CpuOverflow(placement.cpu_memory_margin_bytes) if placement.cpu == "overflow" else None


def _rest(settings: Settings) -> Rest | None:
    placement = settings.placement
    if placement.rest == "off":
        return None
    return Rest(bytes_per_hour=placement.rest_bytes_per_hour, weight=placement.rest_weight)


def warm_models(policy: Policy) -> tuple[str, ...]:
    """Names of the models to load at startup and keep loaded."""
    return tuple(sorted(name for name, pin in policy.pins.items() if pin.keep_warm))


def _exclusive_gpus(settings: Settings, gpus: Sequence[Gpu]) -> dict[GpuUuid, frozenset[str]]:
    key = "placement.exclusive_gpus"
    exclusive: dict[GpuUuid, frozenset[str]] = {}
    spellings: dict[GpuUuid, str] = {}
    for text, names in settings.placement.exclusive_gpus.items():
        uuid = _gpu(text, key, gpus)
        if uuid in exclusive:
            raise ConfigError([f"{key}: {spellings[uuid]!r} and {text!r} are the same GPU: keep one entry"])
        exclusive[uuid], spellings[uuid] = frozenset(_name(name) for name in names), text
    return exclusive


def _name(name: str) -> str:
    try:
        return shortest(name)
    except ValueError as error:
        raise ConfigError([f"models: {error}"]) from error


def _pin(name: str, rules: ModelSettings, gpus: Sequence[Gpu]) -> Pin:
    key = f"models.{name}"
    pinned = tuple(_gpu(text, f"{key}.gpus", gpus) for text in rules.gpus)
    if len(set(pinned)) != len(pinned):
        raise ConfigError([f"{key}.gpus: {', '.join(rules.gpus)} name one GPU twice"])
    if pinned and rules.layout == "cpu":
        raise ConfigError([f"{key}: gpus and layout: cpu exclude each other"])
    if len(pinned) == 1 and rules.layout == "spread":
        raise ConfigError([f"{key}: layout: spread needs several gpus, or none to let the router choose them"])
    return Pin(
        gpus=pinned,
        spread=rules.layout == "spread",
        cpu=rules.layout == "cpu",
        context_length=rules.context_length,
        num_parallel=rules.num_parallel,
        kv_cache_type=rules.kv_cache_type,
        priority=rules.priority,
        replicas_max=rules.replicas_max,
        keep_warm=rules.keep_warm,
    )


def _gpu(text: str, key: str, gpus: Sequence[Gpu]) -> GpuUuid:
    if text.isdecimal():
        found = [gpu for gpu in gpus if gpu.index == int(text)]
    else:
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(text.lower())]
    if len(found) == 1:
        return found[0].uuid
    available = ", ".join(f"{gpu.index}: {gpu.uuid} ({gpu.name})" for gpu in gpus) or "none"
    problem = "is no GPU" if not found else "fits several GPUs"
    raise ConfigError([f"{key}: {text!r} {problem} of this machine; there are: {available}"])
