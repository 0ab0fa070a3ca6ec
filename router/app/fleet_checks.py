"""Rules about GPUs and instances that contradict each other or this machine, whatever models are installed. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router.config.policy import policy_of
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.domain.model_names import ANY_MODEL, shortest
from router.domain.policy import Policy
from router.engines.ollama.instance_plan import (
    CPU,
    CPU_OVERFLOW,
    ON_DEMAND,
    SPREAD,
    InstancePlan,
    PlanError,
    on_demand_like,
    plan_instances,
)
from router.scheduler.placement.explain import GIB, bytes_text

_PORTS = 20_000
"""First port of the planned instances; none is opened."""
_DISCOVERED_NAME = re.compile(rf"gpu\d+|{SPREAD}|{CPU}|{CPU_OVERFLOW}|{ON_DEMAND}")


@dataclass(frozen=True, slots=True)
class FleetCheck:
    """Sentences: what cannot be satisfied, and what probably is not meant. With problems, the rest may be missing."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    specs: tuple[InstanceSpec, ...] = ()
    """The instances that would be started, with ports that nothing listens on."""
    policy: Policy | None = None


def check_fleet(settings: Settings, gpus: Sequence[Gpu], plan: InstancePlan) -> FleetCheck:
    """Checks the rules against the GPUs of this machine."""
    try:
        specs = plan_instances(gpus, plan, itertools.count(_PORTS))
        policy = policy_of(settings, gpus, on_demand_like(plan))
    except PlanError as error:
        return FleetCheck((str(error),))
    except ConfigError as error:
        return FleetCheck(tuple(error.problems))
    problems = (
        *_margin_problems(settings, gpus),
        *_reserved_pins(settings, policy, gpus),
        *_cpu_problems(settings, specs),
        *_unknown_instances(settings),
    )
    warnings = (
        *_missing_instances(settings, specs),
        *_margin_warnings(settings, gpus),
        *_exclusive_warnings(policy, gpus, specs),
    )
    return FleetCheck(problems, warnings, specs, policy)


def _margin_problems(settings: Settings, gpus: Sequence[Gpu]) -> Iterator[str]:
    """A margin that leaves no GPU any memory."""
    margin = settings.placement.vram_margin_bytes
    largest = max((gpu.memory_total_bytes for gpu in gpus if gpu.error is None), default=None)
    if largest is not None and margin >= largest:
        yield (
            f"placement.vram_margin_bytes: {bytes_text(margin)} leave no memory for models: the "
            f"largest GPU has {bytes_text(largest)}"
        )


def _reserved_pins(settings: Settings, policy: Policy, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Models whose rules need GPUs that `placement.exclusive_gpus` keeps for others."""
    usable = [gpu for gpu in gpus if gpu.error is None]
    for written in settings.models:
        pin = policy.pins.get(shortest(written)) if written != ANY_MODEL else None
        if pin is None or pin.cpu:
            continue
        name = shortest(written)
        reserved = [gpu for gpu in usable if name not in policy.exclusive_gpus.get(gpu.uuid, (name,))]
        pinned = [gpu for gpu in reserved if gpu.uuid in pin.gpus]
        for gpu in pinned:
            others = ", ".join(sorted(policy.exclusive_gpus[gpu.uuid])) or "no model"
            yield (
                f"models.{written}.gpus: GPU {gpu.index} is reserved for {others} by placement.exclusive_gpus: "
                f"add {written} there, or pin it to other GPUs"
            )
        free = len(usable) - len(reserved)
        if reserved and not pin.gpus and free < (2 if pin.spread else 1) and (pin.spread or pin.keep_warm):
            rule = "layout: spread" if pin.spread else "keep_warm"
            kept = "all" if free == 0 else "all but one of the"
            yield (
                f"models.{written}: {rule} cannot be met: "
                f"placement.exclusive_gpus reserves {kept} GPUs for other models"
            )


def _cpu_problems(settings: Settings, specs: Sequence[InstanceSpec]) -> Iterator[str]:
    if any(not spec.gpus for spec in specs):
        return
    for name, rules in settings.models.items():
        if rules.layout == "cpu":
            yield (
                f"models.{name}: layout: cpu needs an instance on the CPU, and there is none: declare one with "
                "`instances: [{name: cpu}]` and `discover: true`"
            )


def _unknown_instances(settings: Settings) -> Iterator[str]:
    declared = {instance.name for instance in settings.instances}
    for name in settings.ollama.instance_env:
        if name in declared or (settings.discovers and _DISCOVERED_NAME.fullmatch(name)):
            continue
        there = [
            *sorted(each for each in declared if each),
            *(["gpu0, gpu1, …", SPREAD, CPU] if settings.discovers else []),
        ]
        yield f"ollama.instance_env.{name}: no instance has this name; names are: {', '.join(there) or 'none'}"


def _missing_instances(settings: Settings, specs: Sequence[InstanceSpec]) -> Iterator[str]:
    names = {str(spec.name) for spec in specs} | {ON_DEMAND}
    declared = {instance.name for instance in settings.instances}
    for name in settings.ollama.instance_env:
        if name not in names | declared and _DISCOVERED_NAME.fullmatch(name) and settings.discovers:
            there = ", ".join(sorted(spec.name for spec in specs))
            yield f"ollama.instance_env.{name}: this machine has no such instance; it has: {there}"


def _margin_warnings(settings: Settings, gpus: Sequence[Gpu]) -> Iterator[str]:
    """GPUs that the margin leaves unused."""
    margin = settings.placement.vram_margin_bytes
    for gpu in gpus:
        if gpu.error is None and margin >= gpu.memory_total_bytes:
            yield (
                f"placement.vram_margin_bytes: {margin / GIB:.1f} GiB is all the memory of GPU {gpu.index} "
                f"({gpu.memory_total_bytes / GIB:.1f} GiB): it holds no model"
            )


def _exclusive_warnings(policy: Policy, gpus: Sequence[Gpu], specs: Sequence[InstanceSpec]) -> Iterator[str]:
    usable = [gpu.uuid for gpu in gpus if gpu.error is None]
    has_elsewhere = any(spec.attached and not spec.gpus for spec in specs)
    if usable and not has_elsewhere and all(gpu in policy.exclusive_gpus for gpu in usable):
        names = sorted({name for allowed in policy.exclusive_gpus.values() for name in allowed})
        yield (
            "placement.exclusive_gpus: every GPU is exclusive: models other than "
            f"{', '.join(names) or 'none'} cannot be loaded"
        )


def models_with_rules(settings: Settings) -> list[str]:
    """Names of models whose rules pin them to GPUs or keep them loaded."""
    return [
        name
        for name, rules in settings.models.items()
        if name != ANY_MODEL and rules.engine is None and (rules.gpus or rules.layout != "auto" or rules.keep_warm)
    ]
