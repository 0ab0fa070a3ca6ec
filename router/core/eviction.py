"""Which idle models leave so that another fits: never a busy one, never one on its way in or out.

A greedy choice by age, then pruned: the least recently used go first, and whoever turns out not to be needed stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from router.core.entities import GpuUuid, Residency, ResidencyKey, ResidencyState, Snapshot
from router.core.ledger import bytes_by_gpu


def evictable(snapshot: Snapshot, gpus: Iterable[GpuUuid], *, busy: bool = False) -> list[Residency]:
    """Loaded models that hold memory on these cards, least recently used first; busy ones only if asked for."""
    cards = set(gpus)
    found = [
        residency
        for residency in snapshot.residencies.values()
        if residency.state is ResidencyState.READY
        and (busy or residency.in_flight == 0)
        and any(uuid in cards for uuid, _ in bytes_by_gpu(snapshot, residency))
    ]
    return sorted(found, key=lambda r: (r.in_flight > 0, r.used_at, r.instance, r.blob))


def choose_evictions(
    snapshot: Snapshot, shortfall: Mapping[GpuUuid, int], candidates: Iterable[Residency]
) -> tuple[ResidencyKey, ...] | None:
    """The models to unload so that every card gains its shortfall, or None where they do not suffice.

    `shortfall` is bytes missing per card; cards with nothing missing may be left out. Candidates are taken in the
    order given.
    """
    missing = {gpu: size for gpu, size in shortfall.items() if size > 0}
    chosen: list[Residency] = []
    for residency in candidates:
        if not missing:
            break
        if _helps(snapshot, residency, missing):
            chosen.append(residency)
            missing = _less(snapshot, residency, missing)
    if missing:
        return None
    return tuple((r.instance, r.blob) for r in _prune(snapshot, shortfall, chosen))


def _helps(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> bool:
    return any(gpu in missing and size > 0 for gpu, size in bytes_by_gpu(snapshot, residency))


def _less(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> dict[GpuUuid, int]:
    freed = dict(bytes_by_gpu(snapshot, residency))
    left = {gpu: size - freed.get(gpu, 0) for gpu, size in missing.items()}
    return {gpu: size for gpu, size in left.items() if size > 0}


def _prune(snapshot: Snapshot, shortfall: Mapping[GpuUuid, int], chosen: list[Residency]) -> list[Residency]:
    """Drops from the most recently used on whoever the others make unnecessary."""
    kept = list(chosen)
    for residency in reversed(chosen):
        rest = [r for r in kept if r is not residency]
        missing = {gpu: size for gpu, size in shortfall.items() if size > 0}
        for other in rest:
            missing = _less(snapshot, other, missing)
        if not missing:
            kept = rest
    return kept
