"""On how many GPUs each installed model goes, with its rules and without them, while nothing else is loaded. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from router.app.fleet_checks import GIB, FleetCheck
from router.app.preflight import emptied, empty_snapshot
from router.config.settings import Settings
from router.doctor.facts import ModelFit
from router.domain.gpu import Gpu
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy
from router.engines.ollama.plan import ModelPlan, PlanOptions, largest_context, plan_models
from router.engines.ollama.rules import OllamaRules
from router.scheduler.placement.placement import Decision, Placed, PlacementRequest, place

_ENGINE = OllamaRules()


def model_fits(
    settings: Settings,
    gpus: Sequence[Gpu],
    fleet: FleetCheck,
    models: Sequence[str],
    facts_of: Callable[[str], ModelFacts | None],
    version: str | None,
) -> Iterator[ModelFit]:
    """One fit for each model whose weights can be read. `gpus`: at least one; the decision is that of a router."""
    usable = [emptied(gpu) for gpu in gpus if gpu.error is None]
    policy = fleet.policy
    if policy is None or not usable:
        return
    for name in models:
        facts = facts_of(name)
        if facts is None:
            continue
        pin = policy.pins.get(facts.name)
        if pin is not None and pin.cpu:
            continue
        yield _fit(settings, usable, fleet, policy, facts, pin, version)


def unplaced_models(models: Sequence[str], facts_of: Callable[[str], ModelFacts | None]) -> Iterator[ModelFit]:
    """What is known of the models without GPUs to place them on."""
    for facts in filter(None, map(facts_of, models)):
        yield ModelFit(facts.name, facts.weights_bytes, facts.layers, _num_gpu(facts), 0, 0, "", 0, 0)


def _fit(
    settings: Settings,
    gpus: Sequence[Gpu],
    fleet: FleetCheck,
    policy: Policy,
    facts: ModelFacts,
    pin: Pin | None,
    version: str | None,
) -> ModelFit:
    def placed(rules: Policy) -> Decision:
        options = _ENGINE.default_options(facts, rules.pins.get(facts.name), rules.context_length)
        snapshot = empty_snapshot(rules, gpus, fleet.specs, version)
        return place(snapshot, _ENGINE.estimate_bytes, PlacementRequest(facts, options, may_use_fewer_slots=True))

    own, free = placed(policy), placed(replace(policy, pins={}, exclusive_gpus={}))
    options = PlanOptions(
        default_context_length=settings.ollama.context_length,
        kv_cache_type=settings.ollama.kv_cache_type,
        flash_attention=settings.ollama.flash_attention,
        version=version,
        policy=policy,
    )
    (plan,) = plan_models([facts], gpus, options)
    return ModelFit(
        name=facts.name,
        weights_bytes=facts.weights_bytes,
        layers=facts.layers,
        num_gpu=_num_gpu(facts),
        gpus=_gpu_count(own),
        gpus_min=_gpu_count(free),
        reason="" if isinstance(free, Placed) else _shortfall(plan),
        needed_bytes=sum(part.footprint.total_bytes for part in plan.gpus),
        context_length_max=0 if isinstance(free, Placed) else largest_context([facts], gpus, options),
        is_pinned=pin is not None and bool(pin.gpus or pin.spread),
    )


def _gpu_count(decision: Decision) -> int:
    return len(decision.per_gpu_bytes) if isinstance(decision, Placed) else 0


def _shortfall(plan: ModelPlan) -> str:
    """`GPU 0 needs 22.9 GiB and has 21.7`, of one slot over all GPUs, with what is kept free."""
    return (
        ", ".join(
            f"GPU {part.gpu.index} needs {(part.footprint.total_bytes + part.margin_bytes) / GIB:.1f} GiB and has "
            f"{part.gpu.memory_free_bytes / GIB:.1f}"
            for part in plan.gpus
            if part.missing_bytes
        )
        or "no arrangement of its layers fits"
    )


def _num_gpu(facts: ModelFacts) -> int | None:
    value = dict(facts.parameters).get("num_gpu", "")
    return int(value) if value.lstrip("-").isdigit() else None
