"""The configuration's rules of placement in the deciding core's terms: pins of models, GPUs for some models only.

GPUs are named by UUID, its beginning or index, and must be there; names of models are brought into their one form.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.config.schema import ModelSettings
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceSpec
from router.domain.model_names import shortest
from router.domain.policy import Pin, Policy, SchedulerConstants

ANY_MODEL = "*"
UNSEEN_MARGIN_RATIO = 0.02
"""Estimates came within 2 % of what a 70B was measured to take (tests/engines/ollama/test_memory_estimate.py)."""


def policy_of(settings: Settings, gpus: Sequence[Gpu], like: InstanceSpec) -> Policy:
    """Everything that decisions use. `like`: the tuning of instances that are started on demand.

    Raises:
        ConfigError: a pin names a GPU that is not there, a model by no name, or asks for what excludes itself.
    """
    placement = settings.placement
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
        pins={_name(name): _pin(name, one, gpus) for name, one in settings.models.items() if name != ANY_MODEL},
        exclusive_gpus={
            _gpu(wanted, "placement.exclusive_gpus", gpus): frozenset(_name(name) for name in names)
            for wanted, names in settings.placement.exclusive_gpus.items()
        },
        constants=SchedulerConstants(unseen_margin_ratio=UNSEEN_MARGIN_RATIO),
    )


def warm_models(policy: Policy) -> tuple[str, ...]:
    """Names of the models that shall be loaded whether or not anybody asks."""
    return tuple(sorted(name for name, pin in policy.pins.items() if pin.keep_warm))


def _name(name: str) -> str:
    try:
        return shortest(name)
    except ValueError as error:
        raise ConfigError([f"models: {error}"]) from error


def _pin(name: str, one: ModelSettings, gpus: Sequence[Gpu]) -> Pin:
    where = f"models.{name}"
    pinned = tuple(_gpu(wanted, f"{where}.gpus", gpus) for wanted in one.gpus)
    if pinned and one.layout == "cpu":
        raise ConfigError([f"{where}: gpus and layout: cpu exclude each other"])
    if len(pinned) == 1 and one.layout == "spread":
        raise ConfigError([f"{where}: layout: spread needs several gpus, or none to let the router choose them"])
    return Pin(
        gpus=pinned,
        spread=one.layout == "spread",
        cpu=one.layout == "cpu",
        context_length=one.context_length,
        num_parallel=one.num_parallel,
        kv_cache_type=one.kv_cache_type,
        priority=one.priority,
        replicas_max=one.replicas_max,
        keep_warm=one.keep_warm,
    )


def _gpu(wanted: str, where: str, gpus: Sequence[Gpu]) -> GpuUuid:
    if wanted.isdecimal():
        found = [gpu for gpu in gpus if gpu.index == int(wanted)]
    else:
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(wanted.lower())]
    if len(found) == 1:
        return found[0].uuid
    there = ", ".join(f"{gpu.index}: {gpu.uuid} ({gpu.name})" for gpu in gpus) or "none"
    problem = "is no GPU" if not found else "fits several GPUs"
    raise ConfigError([f"{where}: {wanted!r} {problem} of this machine; there are: {there}"])
