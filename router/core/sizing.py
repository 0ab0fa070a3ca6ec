"""Bytes a load would take on each card of an instance: what placement asks for every candidate.

Puts the instance's tuning (slots, cache type, flash attention, version) and the way it splits layers together with the
figures of `core/estimate.py`. The router loads with all layers asked for, which splits them evenly over the cards: by
itself up to 0.24, and from 0.30 because such instances are given an even `LLAMA_ARG_TENSOR_SPLIT`. Only a model whose
own file says how many layers go to the cards is split as its server likes.

A server of several cards that was not told to spread first looks whether one of them holds the model, by a rule and by
free memory of its own, and then takes that one alone. Which of both comes is not known before the load ends, so that
both are reserved: on each card what it takes at most.
"""

from __future__ import annotations

from dataclasses import replace

from router.core.entities import Footprint, GpuUuid, InstanceSpec, ModelFacts, Snapshot
from router.core.estimate import (
    batch_tokens,
    even_split,
    fill_first_split,
    footprint_of_split,
    foretold_bytes,
    is_from_0_30,
)
from router.core.ledger import capacity_bytes, slots_of
from router.core.options import has_own_layers
from router.core.placement import Estimate

_TOLD_TO_SPREAD = {"OLLAMA_SCHED_SPREAD": "1"}
_ONE_CARD_SHARE = 0.8
"""Of a card's free memory: what a server from 0.30 foretells of a model must not be more for the card to be taken alone
(server/sched.go, v0.33)."""


def estimate_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    """Bytes on each card of the instance, in its card order, at most; empty for one without cards."""
    return either_way(_estimated_bytes, model, spec, context_length, snapshot)


def _estimated_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    return estimated_footprint(model, spec, context_length, snapshot).per_gpu_bytes


def either_way(
    estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[int, ...]:
    """What `estimate` says of each card, or of the whole model on that card alone where the server may put it so and
    that is more."""
    alone = cards_taken_alone(model, spec, context_length, snapshot)
    if not alone:
        return estimate(model, spec, context_length, snapshot)
    told = spec if has_own_layers(model) else replace(spec, environment={**spec.environment, **_TOLD_TO_SPREAD})
    found = list(estimate(model, told, context_length, snapshot))
    for index, gpu in enumerate(spec.gpus):
        if gpu in alone:
            found[index] = max(found[index], *estimate(model, replace(spec, gpus=(gpu,)), context_length, snapshot))
    return tuple(found)


def cards_taken_alone(
    model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> frozenset[GpuUuid]:
    """Cards of an instance of several which its server could find to hold the model, and then takes alone; none where
    it is told to spread. What is free when it looks is not known before: a card counts as if nothing was on it."""
    if len(spec.gpus) < 2 or _is_told_to_spread(spec):
        return frozenset()
    if is_from_0_30(_version(spec, snapshot)):
        slots = slots_of(model, spec, snapshot.policy)
        least = foretold_bytes(model, context_length, slots) / _ONE_CARD_SHARE
    else:
        least = estimated_footprint(model, replace(spec, gpus=spec.gpus[:1]), context_length, snapshot).total_bytes
    cards = [snapshot.gpus[gpu] for gpu in spec.gpus if gpu in snapshot.gpus]
    return frozenset(card.uuid for card in cards if least <= card.memory_free_bytes + card.memory_used_bytes)


def _is_told_to_spread(spec: InstanceSpec) -> bool:
    return _TOLD_TO_SPREAD.items() <= spec.environment.items()


def estimated_footprint(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> Footprint:
    """The whole footprint with its parts. `context_length`: tokens of one slot, cut to the trained context."""
    slots = slots_of(model, spec, snapshot.policy)
    version = _version(spec, snapshot)
    batch = batch_tokens(version, context_length, slots)
    cache, flash = spec.kv_cache_type, spec.flash_attention
    if flash is None and _is_before_0_12(version):
        flash = False  # such a server uses it only where it is told to
    split = even_split(model.layers, len(spec.gpus))
    if has_own_layers(model) and _fills_first(spec):
        free = [capacity_bytes(snapshot, gpu) for gpu in spec.gpus]
        split = fill_first_split(model, free, context_length, slots, cache, flash, batch) or split
    return footprint_of_split(model, split, context_length, slots, cache, flash, batch)


def _version(spec: InstanceSpec, snapshot: Snapshot) -> str | None:
    """Of the instance; one that is to be started will be of the version that its siblings are."""
    view = snapshot.instances.get(spec.name)
    if view is not None and view.version is not None:
        return view.version
    return next((v.version for v in snapshot.instances.values() if v.version is not None), None)


def _is_before_0_12(version: str | None) -> bool:
    return version is not None and version.split(".")[:2] in (["0", str(minor)] for minor in range(12))


def _fills_first(spec: InstanceSpec) -> bool:
    """Whether the server fills a card before it begins the next: over several cards, without `OLLAMA_SCHED_SPREAD`."""
    return len(spec.gpus) > 1 and not spec.attached and not _is_told_to_spread(spec)
