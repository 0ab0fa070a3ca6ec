"""Which loaded models to unload so that another fits: the cheapest set, without pinned, loading or unloading models.

Prices come from `scheduler/placement/cost.py`. Busy models are included only if the caller allows it: they then take no
new request and are unloaded when the running ones have ended. A model that was just loaded stays for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu, memoise, promised
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
    freed = freed_by_replica(snapshot)
    ranked = memoise(snapshot, (_ranked, busy, young), lambda: _ranked(snapshot, busy, young))
    return [r for r in ranked if not gpus.isdisjoint(freed[r.instance, r.blob])]


def _ranked(snapshot: Snapshot, busy: bool, young: bool) -> list[Residency]:
    """Those on any GPU: their order is the same for every set of GPUs."""
    leaving = promised(snapshot)
    found = [
        residency
        for key, residency in snapshot.residencies.items()
        if residency.state is ResidencyState.READY
        and (busy or residency.in_flight == 0)
        and (young or _is_settled(snapshot, residency))
        and key not in leaving
        and not snapshot.policy.keeps_warm(residency.name)
    ]
    return sorted(found, key=lambda r: (r.in_flight > 0, eviction_price(snapshot, r), r.used_at, r.instance, r.blob))


def freed_by_replica(snapshot: Snapshot) -> Mapping[ResidencyKey, Mapping[GpuUuid, int]]:
    """Bytes on each GPU that unloading a residency frees."""
    return memoise(
        snapshot,
        freed_by_replica,
        lambda: {key: dict(bytes_by_gpu(snapshot, residency)) for key, residency in snapshot.residencies.items()},
    )


class Leaver(NamedTuple):
    """A model that may leave, as far as it concerns some GPUs."""

    key: ResidencyKey
    freed_bytes: tuple[int, ...]
    """On each of these GPUs."""
    price: float
    in_flight: int


def leavers(snapshot: Snapshot, gpus: tuple[GpuUuid, ...], *, busy: bool, young: bool) -> list[Leaver]:
    """What `evictable` returns for these GPUs, in the same order."""
    return memoise(
        snapshot,
        (leavers, gpus, busy, young),
        lambda: _as_leavers(snapshot, gpus, evictable(snapshot, gpus, busy=busy, young=young)),
    )


def _as_leavers(snapshot: Snapshot, gpus: tuple[GpuUuid, ...], candidates: Iterable[Residency]) -> list[Leaver]:
    freed = freed_by_replica(snapshot)
    found: list[Leaver] = []
    for residency in candidates:
        key = (residency.instance, residency.blob)
        part = freed[key]
        price = eviction_price(snapshot, residency)
        found.append(Leaver(key, tuple(part.get(gpu, 0) for gpu in gpus), price, residency.in_flight))
    return found


def choose_evictions(
    snapshot: Snapshot, shortfall: Mapping[GpuUuid, int], candidates: Iterable[Residency]
) -> tuple[ResidencyKey, ...] | None:
    """The models to unload so that every GPU gains its shortfall; None if all candidates together are not enough.

    `shortfall` is bytes missing per GPU; GPUs with nothing missing may be left out. Candidates are taken in the order
    given, and those that turn out to be unnecessary are dropped. A single model that is enough replaces them where it
    is cheaper than they are together.
    """
    missing = {gpu: size for gpu, size in shortfall.items() if size > 0}
    options = _as_leavers(snapshot, tuple(missing), candidates) if missing else []
    chosen = cheapest(options, list(missing.values()))
    return None if chosen is None else tuple(leaver.key for leaver in chosen)


def cheapest(options: Sequence[Leaver], missing_bytes: Sequence[int]) -> list[Leaver] | None:
    """The same for the bytes that are missing on each of the GPUs that the options were listed for, all above 0."""
    if not missing_bytes:
        return []
    chosen = _first_that_cover(options, missing_bytes)
    if chosen is None or len(chosen) < 2:
        return chosen
    is_busy = any(leaver.in_flight for leaver in chosen)
    alone = [o for o in options if (is_busy or not o.in_flight) and _covers(o.freed_bytes, missing_bytes)]
    best = min(alone, key=lambda leaver: leaver.price, default=None)
    return [best] if best is not None and best.price < sum(leaver.price for leaver in chosen) else chosen


def price_of(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float:
    """Seconds that clients are expected to lose if all of these are unloaded."""
    return sum(eviction_price(snapshot, snapshot.residencies[key]) for key in keys)


def _is_settled(snapshot: Snapshot, residency: Residency) -> bool:
    return snapshot.now - residency.loaded_at >= snapshot.policy.constants.residency_seconds_min


def _first_that_cover(options: Sequence[Leaver], missing_bytes: Sequence[int]) -> list[Leaver] | None:
    remaining, gpus_short = list(missing_bytes), len(missing_bytes)
    chosen: list[Leaver] = []
    for leaver in options:
        helps = False
        for at, size in enumerate(leaver.freed_bytes):
            if size > 0 and remaining[at] > 0:
                helps = True
                remaining[at] -= size
                gpus_short -= remaining[at] <= 0
        if helps:
            chosen.append(leaver)
            if not gpus_short:
                return _prune(chosen, missing_bytes) if len(chosen) > 1 else chosen
    return None


def _covers(freed_bytes: Sequence[int], missing_bytes: Sequence[int]) -> bool:
    return all(freed >= size for freed, size in zip(freed_bytes, missing_bytes, strict=True))


def _prune(chosen: Sequence[Leaver], missing_bytes: Sequence[int]) -> list[Leaver]:
    """Drops models that the others make unnecessary, the most expensive first. `chosen` as a whole is enough."""
    spare = [-size for size in missing_bytes]
    for leaver in chosen:
        for at, size in enumerate(leaver.freed_bytes):
            spare[at] += size
    kept: list[Leaver] = []
    for leaver in reversed(chosen):
        if _covers(spare, leaver.freed_bytes):
            for at, size in enumerate(leaver.freed_bytes):
                spare[at] -= size
        else:
            kept.append(leaver)
    return kept[::-1]
