"""Which loaded models leave so that another fits: the cheapest set, never a pinned one, never one in transit.

The price of each is `scheduler/placement/cost.py`'s. Busy models are taken only where the caller asks for them: they
then take no new request and leave when the running ones have ended. A model that has just come stays for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from router.domain.gpu import GpuUuid
from router.domain.policy import Pin
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu, memoise, promised, residencies_on
from router.scheduler.placement.cost import eviction_price


def pin_of(snapshot: Snapshot, name: str) -> Pin | None:
    return snapshot.policy.pins.get(name)


def is_pinned(snapshot: Snapshot, residency: Residency) -> bool:
    """Whether it stays whatever others want."""
    pin = pin_of(snapshot, residency.name)
    return pin is not None and pin.keep_warm


def evictable(
    snapshot: Snapshot, gpus: Iterable[GpuUuid], *, busy: bool = False, young: bool = False
) -> list[Residency]:
    """Loaded models that hold memory on these GPUs, the cheapest first; busy or young ones only if asked for."""
    uuids = frozenset(gpus)
    return memoise(snapshot, (evictable, uuids, busy, young), lambda: _evictable(snapshot, uuids, busy, young))


def _evictable(snapshot: Snapshot, gpus: frozenset[GpuUuid], busy: bool, young: bool) -> list[Residency]:
    there = dict.fromkeys(key for gpu in gpus for key in residencies_on(snapshot, gpu))
    found = [
        residency
        for residency in map(snapshot.residencies.__getitem__, there)
        if residency.state is ResidencyState.READY
        and (busy or residency.in_flight == 0)
        and (young or _is_settled(snapshot, residency))
        and (residency.instance, residency.blob) not in promised(snapshot)
        and not is_pinned(snapshot, residency)
        and any(uuid in gpus for uuid, _ in bytes_by_gpu(snapshot, residency))
    ]
    prices = {(r.instance, r.blob): eviction_price(snapshot, r) for r in found}
    return sorted(found, key=lambda r: (r.in_flight > 0, prices[r.instance, r.blob], r.used_at, r.instance, r.blob))


def choose_evictions(
    snapshot: Snapshot, shortfall: Mapping[GpuUuid, int], candidates: Iterable[Residency]
) -> tuple[ResidencyKey, ...] | None:
    """The models to unload so that every GPU gains its shortfall, or None where they do not suffice.

    `shortfall` is bytes missing per GPU; GPUs with nothing missing may be left out. Candidates are taken in the
    order given, whoever turns out not to be needed stays, and one model that suffices alone is taken where it costs
    less than those together.
    """
    missing = {gpu: size for gpu, size in shortfall.items() if size > 0}
    offered = list(candidates)
    chosen = _first_that_cover(snapshot, missing, offered)
    if chosen is None:
        return None
    if len(chosen) > 1:
        chosen = _cheaper_alone(snapshot, missing, offered, chosen) or chosen
    return tuple((r.instance, r.blob) for r in chosen)


def price_of(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float:
    """Seconds that unloading all of these is expected to cost."""
    return sum(eviction_price(snapshot, snapshot.residencies[key]) for key in keys)


def _is_settled(snapshot: Snapshot, residency: Residency) -> bool:
    return snapshot.now - residency.loaded_at >= snapshot.policy.constants.residency_seconds_min


def _first_that_cover(
    snapshot: Snapshot, missing: Mapping[GpuUuid, int], offered: Sequence[Residency]
) -> list[Residency] | None:
    left = dict(missing)
    chosen: list[Residency] = []
    for residency in offered:
        if not left:
            break
        if _helps(snapshot, residency, left):
            chosen.append(residency)
            left = _less(snapshot, residency, left)
    return None if left else _prune(snapshot, missing, chosen)


def _cheaper_alone(
    snapshot: Snapshot, missing: Mapping[GpuUuid, int], offered: Sequence[Residency], chosen: Sequence[Residency]
) -> list[Residency] | None:
    together = sum(eviction_price(snapshot, r) for r in chosen)
    is_busy = any(r.in_flight for r in chosen)
    alone = [
        (eviction_price(snapshot, r), r)
        for r in offered
        if (is_busy or r.in_flight == 0) and not _less(snapshot, r, missing)
    ]
    price, best = min(alone, key=lambda found: found[0], default=(together, None))
    return [best] if best is not None and price < together else None


def _freed(snapshot: Snapshot, residency: Residency) -> Mapping[GpuUuid, int]:
    key = (_freed, residency.instance, residency.blob)
    return memoise(snapshot, key, lambda: dict(bytes_by_gpu(snapshot, residency)))


def _helps(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> bool:
    freed = _freed(snapshot, residency)
    return any(freed.get(gpu, 0) > 0 for gpu in missing)


def _less(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> dict[GpuUuid, int]:
    freed = _freed(snapshot, residency)
    return {gpu: left for gpu, size in missing.items() if (left := size - freed.get(gpu, 0)) > 0}


def _prune(snapshot: Snapshot, missing: Mapping[GpuUuid, int], chosen: Sequence[Residency]) -> list[Residency]:
    """Drops from the dearest on whoever the others make unnecessary. All of `chosen` together suffice."""
    if len(chosen) < 2:
        return list(chosen)
    kept, parts = list(chosen), [_freed(snapshot, residency) for residency in chosen]
    spare = {gpu: sum(part.get(gpu, 0) for part in parts) - size for gpu, size in missing.items()}
    for residency, freed in zip(reversed(chosen), reversed(parts), strict=True):
        if all(freed.get(gpu, 0) <= left for gpu, left in spare.items()):
            spare = {gpu: left - freed.get(gpu, 0) for gpu, left in spare.items()}
            kept.remove(residency)
    return kept
