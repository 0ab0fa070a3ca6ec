"""Bytes a load would take on each card of an instance: what placement asks for every candidate.

Puts the instance's tuning (slots, cache type, flash attention, version) and the way it splits layers together with the
figures of `engines/ollama/memory_estimate.py`. The router loads with all layers asked for, which are shared out by the
cards' memory: evenly on equal cards, and before 0.30 on all (`engines/ollama/tensor_split.py`). Only a model whose own
file says how many layers go to the cards is split as its server likes. And a server over several cards that is not
told to spread puts a model that one of them holds wholly there, all the same: each card it may choose is to hold all.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.footprint import Footprint
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import capacity_bytes, slots_of
from router.engines.ollama.memory_estimate import batch_tokens, fill_first_split, footprint_of_split, split_by
from router.engines.ollama.offload_rules import SPREADING, may_take_one_card, spreads
from router.engines.ollama.runner_options import has_own_layers
from router.engines.ollama.tensor_split import shares_of
from router.scheduler.placement.placement import Estimate


def estimate_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    """Bytes on each card of the instance, in its card order, at most; empty for one without cards."""
    return either_way(_shares, model, spec, context_length, snapshot)


def _shares(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    return estimated_footprint(model, spec, context_length, snapshot).per_gpu_bytes


def either_way(
    estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[int, ...]:
    """What `estimate` says of each card's share, or of the whole model on that card alone where the server may put it
    there and that is more; but no more than a card that is empty can give, which leaves room for nothing beside it."""
    alone = may_be_alone(model, spec, context_length, snapshot)
    if not any(alone):
        return estimate(model, spec, context_length, snapshot)
    told = spec if has_own_layers(model) else replace(spec, environment={**spec.environment, **SPREADING})
    found = list(estimate(model, told, context_length, snapshot))
    for index, gpu in enumerate(spec.gpus):
        if alone[index]:
            (whole,) = estimate(model, replace(spec, gpus=(gpu,)), context_length, snapshot)
            card = snapshot.gpus[gpu]
            most = card.memory_free_bytes + card.memory_used_bytes - snapshot.policy.vram_margin_bytes
            found[index] = max(found[index], min(whole, most))
    return tuple(found)


def may_be_alone(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[bool, ...]:
    """For each card of the instance: whether its server could put the whole model there, others being left empty; ()
    where it surely does not."""
    if len(spec.gpus) < 2 or spreads(spec):
        return ()
    cards = [snapshot.gpus[gpu].memory_total_bytes if gpu in snapshot.gpus else 0 for gpu in spec.gpus]
    slots = slots_of(model, spec, snapshot.policy)
    return may_take_one_card(model, spec, version_of(spec, snapshot), context_length, slots, cards)


def estimated_footprint(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> Footprint:
    """The whole footprint with its parts, shared out over all cards. `context_length`: tokens of one slot, cut to the
    trained context."""
    slots = slots_of(model, spec, snapshot.policy)
    version = version_of(spec, snapshot)
    batch = batch_tokens(version, context_length, slots)
    cache, flash = spec.kv_cache_type, spec.flash_attention
    split = split_by(model.layers, shares_of(spec, version))
    if has_own_layers(model) and _fills_first(spec):
        free = [capacity_bytes(snapshot, gpu) for gpu in spec.gpus]
        split = fill_first_split(model, free, context_length, slots, cache, flash, batch, version) or split
    return footprint_of_split(model, split, context_length, slots, cache, flash, batch, version)


def version_of(spec: InstanceSpec, snapshot: Snapshot) -> str | None:
    """Of the instance; one that is to be started will be of the version that its siblings are."""
    view = snapshot.instances.get(spec.name)
    if view is not None and view.version is not None:
        return view.version
    return next((v.version for v in snapshot.instances.values() if v.version is not None), None)


def _fills_first(spec: InstanceSpec) -> bool:
    """Whether the server fills a card before it begins the next: over several cards, without `OLLAMA_SCHED_SPREAD`."""
    return len(spec.gpus) > 1 and not spec.attached and not spreads(spec)
