"""Bytes a load would take on each card of an instance: what placement asks for every candidate.

Puts the instance's tuning (slots, cache type, flash attention, version) and the way it splits layers together with the
figures of `core/estimate.py`. It looks at no card's free memory but to tell how a fill-first instance would split.
"""

from __future__ import annotations

from router.core.entities import Footprint, InstanceSpec, ModelFacts, Snapshot
from router.core.estimate import (
    batch_tokens,
    even_split,
    fill_first_split,
    footprint_of_split,
)
from router.core.ledger import capacity_bytes, slots_of


def estimate_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    """Bytes on each card of the instance, in its card order; empty for one without cards."""
    return estimated_footprint(model, spec, context_length, snapshot).per_gpu_bytes


def estimated_footprint(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> Footprint:
    """The whole footprint with its parts. `context_length`: tokens of one slot, cut to the trained context."""
    slots = slots_of(model, spec, snapshot.policy)
    view = snapshot.instances.get(spec.name)
    batch = batch_tokens(view.version if view is not None else None, context_length, slots)
    cache, flash = spec.kv_cache_type, spec.flash_attention
    split = even_split(model.layers, len(spec.gpus))
    if _fills_first(spec):
        free = [capacity_bytes(snapshot, gpu) for gpu in spec.gpus]
        split = fill_first_split(model, free, context_length, slots, cache, flash, batch) or split
    return footprint_of_split(model, split, context_length, slots, cache, flash, batch)


def _fills_first(spec: InstanceSpec) -> bool:
    """Whether the server fills a card before it begins the next: over several cards, without `OLLAMA_SCHED_SPREAD`."""
    return len(spec.gpus) > 1 and not spec.attached and spec.environment.get("OLLAMA_SCHED_SPREAD") != "1"
