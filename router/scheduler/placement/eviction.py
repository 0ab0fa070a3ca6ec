"""Which loaded models to unload so that another fits: the cheapest set, without pinned, loading or unloading models.

Prices come from `scheduler/placement/cost.py`. Busy models are included only if the caller allows it: they then take no
new request and are unloaded when the running ones have ended. A model that was just loaded stays for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu, memoise, promised, residencies_on
from router.scheduler.placement.cost import eviction_price


def evictable(
    snapshot: Snapshot, gpus: Iterable[GpuUuid], *, busy: bool = False, young: bool = False
) -> list[Residency]:
    """Loaded models that hold memory on these GPUs, cheapest first.

    Busy models, and young ones (loaded less than `residency_seconds_min` ago), are included only if requested.
    """
    uuids = frozenset(gpus)
    return memoise(snapshot, (evictable, uuids, busy, young), lambda: _evictable(snapshot, uuids, busy, young))


def _evictable(snapshot: Snapshot, gpus: frozenset[GpuUuid], busy: bool, young: bool) -> list[Residency]:
    keys = dict.fromkeys(key for gpu in gpus for key in residencies_on(snapshot, gpu))
    found = [
        residency
        for residency in map(snapshot.residencies.__getitem__, keys)
        if residency.state is ResidencyState.READY
        and (busy or residency.in_flight == 0)
        and (young or _is_settled(snapshot, residency))
        and (residency.instance, residency.blob) not in promised(snapshot)
        and not snapshot.policy.keeps_warm(residency.name)
        and any(uuid in gpus for uuid, _ in bytes_by_gpu(snapshot, residency))
    ]
    prices = {(r.instance, r.blob): eviction_price(snapshot, r) for r in found}
    return sorted(found, key=lambda r: (r.in_flight > 0, prices[r.instance, r.blob], r.used_at, r.instance, r.blob))


def choose_evictions(
    snapshot: Snapshot, shortfall: Mapping[GpuUuid, int], candidates: Iterable[Residency]
) -> tuple[ResidencyKey, ...] | None:
    """The models to unload so that every GPU gains its shortfall; None if all candidates together are not enough.

    `shortfall` is bytes missing per GPU; GPUs with nothing missing may be left out. Candidates are taken in the order
    given, and those that turn out to be unnecessary are dropped. A single model that is enough replaces them where it
    is cheaper than they are together.
    """
    missing = {gpu: size for gpu, size in shortfall.items() if size > 0}
    ordered = list(candidates)
    chosen = _first_that_cover(snapshot, missing, ordered)
    if chosen is None:
        return None
    if len(chosen) > 1:
        chosen = _cheaper_alone(snapshot, missing, ordered, chosen) or chosen
    return tuple((r.instance, r.blob) for r in chosen)


def price_of(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float:
    """Seconds that clients are expected to lose if all of these are unloaded."""
    return sum(eviction_price(snapshot, snapshot.residencies[key]) for key in keys)


def _is_settled(snapshot: Snapshot, residency: Residency) -> bool:
    return snapshot.now - residency.loaded_at >= snapshot.policy.constants.residency_seconds_min


def _first_that_cover(
    snapshot: Snapshot, missing: Mapping[GpuUuid, int], candidates: Sequence[Residency]
) -> list[Residency] | None:
    remaining = dict(missing)
    chosen: list[Residency] = []
    for residency in candidates:
        if not remaining:
            break
        if _helps(snapshot, residency, remaining):
            chosen.append(residency)
            remaining = _missing_without(snapshot, residency, remaining)
    return None if remaining else _prune(snapshot, missing, chosen)


def _cheaper_alone(
    snapshot: Snapshot, missing: Mapping[GpuUuid, int], candidates: Sequence[Residency], chosen: Sequence[Residency]
) -> list[Residency] | None:
    price_of_chosen = sum(eviction_price(snapshot, r) for r in chosen)
    is_busy = any(r.in_flight for r in chosen)
    alternatives = [
        (eviction_price(snapshot, r), r)
        for r in candidates
        if (is_busy or r.in_flight == 0) and not _missing_without(snapshot, r, missing)
    ]
    price, cheapest = min(alternatives, key=lambda found: found[0], default=(price_of_chosen, None))
    return [cheapest] if cheapest is not None and price < price_of_chosen else None


def _freed(snapshot: Snapshot, residency: Residency) -> Mapping[GpuUuid, int]:
    key = (_freed, residency.instance, residency.blob)
    return memoise(snapshot, key, lambda: dict(bytes_by_gpu(snapshot, residency)))


def _helps(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> bool:
    freed = _freed(snapshot, residency)
    return any(freed.get(gpu, 0) > 0 for gpu in missing)


def _missing_without(snapshot: Snapshot, residency: Residency, missing: Mapping[GpuUuid, int]) -> dict[GpuUuid, int]:
    """Bytes that are still missing per GPU when this model is unloaded."""
    freed = _freed(snapshot, residency)
    return {gpu: rest for gpu, size in missing.items() if (rest := size - freed.get(gpu, 0)) > 0}


def _prune(snapshot: Snapshot, missing: Mapping[GpuUuid, int], chosen: Sequence[Residency]) -> list[Residency]:
    """Drops models that the others make unnecessary, the most expensive first. `chosen` as a whole is enough."""
    if len(chosen) < 2:
        return list(chosen)
    kept, parts = list(chosen), [_freed(snapshot, residency) for residency in chosen]
    spare = {gpu: sum(part.get(gpu, 0) for part in parts) - size for gpu, size in missing.items()}
    for residency, freed in zip(reversed(chosen), reversed(parts), strict=True):
        if all(freed.get(gpu, 0) <= size for gpu, size in spare.items()):
            spare = {gpu: size - freed.get(gpu, 0) for gpu, size in spare.items()}
            kept.remove(residency)
    return kept
