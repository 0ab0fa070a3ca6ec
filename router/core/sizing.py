"""Bytes a load would take on each card of an instance: what placement asks for every candidate.

Puts the instance's tuning (slots, cache type, flash attention, version) and the way it splits layers together with the
figures of `core/estimate.py`. The router loads with all layers asked for, which splits them evenly over the cards: by
itself up to 0.24, and from 0.30 because such instances are given an even `LLAMA_ARG_TENSOR_SPLIT`. Only a model whose
own file says how many layers go to the cards is split as its server likes. And a server of 0.30 or later over several
cards puts a model that one of them holds well wholly there, all the same: each card it may choose is to hold all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from router.core.entities import Footprint, InstanceSpec, InstanceView, ModelFacts, Snapshot
from router.core.estimate import (
    batch_tokens,
    even_split,
    fill_first_split,
    footprint_of_split,
)
from router.core.ledger import capacity_bytes, slots_of
from router.core.options import has_own_layers
from router.core.veto import may_take_one_card


def estimate_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    """Bytes on each card of the instance, in its card order; empty for one without cards."""
    return estimated_footprint(model, spec, context_length, snapshot).per_gpu_bytes


def estimated_footprint(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> Footprint:
    """The whole footprint with its parts. `context_length`: tokens of one slot, cut to the trained context."""
    slots = slots_of(model, spec, snapshot.policy)
    view = snapshot.instances.get(spec.name)
    if view is None or view.version is None:
        # One that is to be started will be of the version that its siblings are.
        view = next((v for v in snapshot.instances.values() if v.version is not None), view)
    batch = batch_tokens(view.version if view is not None else None, context_length, slots)
    cache, flash = spec.kv_cache_type, spec.flash_attention
    if flash is None and _is_before_0_12(view):
        flash = False  # such a server uses it only where it is told to
    split = even_split(model.layers, len(spec.gpus))
    if has_own_layers(model) and _fills_first(spec):
        free = [capacity_bytes(snapshot, gpu) for gpu in spec.gpus]
        split = fill_first_split(model, free, context_length, slots, cache, flash, batch) or split
    found = footprint_of_split(model, split, context_length, slots, cache, flash, batch)
    version = view.version if view is not None else None
    cards = [snapshot.gpus[gpu].memory_total_bytes if gpu in snapshot.gpus else 0 for gpu in spec.gpus]
    alone = may_take_one_card(model, spec, version, context_length, slots, cards)
    if not any(alone):
        return found
    whole = footprint_of_split(model, even_split(model.layers, 1), context_length, slots, cache, flash, batch)
    return replace(found, per_gpu_bytes=on_any(found.per_gpu_bytes, whole.per_gpu_bytes[0], alone))


def on_any(shares: Sequence[int], whole: int, alone: Sequence[bool]) -> tuple[int, ...]:
    """A share of each card, and the whole of each that may get it."""
    return tuple(max(size, whole * may) for size, may in zip(shares, alone, strict=True))


def _is_before_0_12(view: InstanceView | None) -> bool:
    version = view.version if view is not None else None
    return version is not None and version.split(".")[:2] in (["0", str(minor)] for minor in range(12))


def _fills_first(spec: InstanceSpec) -> bool:
    """Whether the server fills a card before it begins the next: over several cards, without `OLLAMA_SCHED_SPREAD`."""
    return len(spec.gpus) > 1 and not spec.attached and spec.environment.get("OLLAMA_SCHED_SPREAD") != "1"
