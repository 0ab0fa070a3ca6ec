"""Who has to leave to make room for a load on given GPUs, at least price, and what that costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from router.domain.gpu import GpuUuid
from router.domain.residency import ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu, gpus_of, memoise, promised
from router.domain.vram_ledger import leaving_bytes, overcounted_bytes, underestimated_bytes
from router.scheduler.placement.candidate_size import Need, free_room
from router.scheduler.placement.cost import service_seconds
from router.scheduler.placement.eviction import (
    cheapest,
    choose_evictions,
    evictable,
    freed_by_replica,
    leavers,
    price_of,
)


class Departures(NamedTuple):
    """Models that leave to make room, and what that costs."""

    evict: tuple[ResidencyKey, ...]
    running: int
    """Requests of those that are busy."""
    price: float
    lost_bytes: int
    drain_seconds: float
    """Until the last of the busy ones is idle, if each request has half its time to go."""


def common_departures(snapshot: Snapshot, need: Need, *, busy: bool, young: bool) -> Departures | None:
    """The same as `departures` for a model without replicas: known for models of equal size, and for all groups of
    one model."""
    known: dict[Need, Departures | None] = memoise(
        snapshot, (common_departures, busy, young), dict[Need, Departures | None]
    )
    if need not in known:
        known[need] = _departures_for_new(snapshot, need, busy=busy, young=young)
    return known[need]


def _departures_for_new(snapshot: Snapshot, need: Need, *, busy: bool, young: bool) -> Departures | None:
    short = list(_shortfall(snapshot, need))
    options = leavers(snapshot, tuple(gpu for gpu, _ in short), busy=busy, young=young) if short else []
    chosen = cheapest(options, [size for _, size in short])
    if chosen is None:
        return departures(snapshot, need, None, (), busy=busy, young=young)
    evict = tuple(leaver.key for leaver in chosen)
    price = sum(leaver.price for leaver in chosen)
    return _with_relied_on(snapshot, need, evict, price)


def _with_relied_on(snapshot: Snapshot, need: Need, evict: tuple[ResidencyKey, ...], price: float) -> Departures:
    evict = (*evict, *(key for key in _relied_on(snapshot, need) if key not in evict))
    leaving = [snapshot.residencies[key] for key in evict]
    lost = sum(sum(r.per_gpu_bytes) for r in leaving)
    drain = max((service_seconds(snapshot, r) / 2 for r in leaving if r.in_flight), default=0.0)
    return Departures(evict, sum(r.in_flight for r in leaving), price, lost, drain)


def departures(
    snapshot: Snapshot,
    need: Need,
    own: ResidencyKey | None,
    supersedes: Collection[ResidencyKey],
    *,
    busy: bool,
    young: bool,
) -> Departures | None:
    """Who leaves to make room for `need`, the model's own replica `own` included if there is one."""
    own_replica = None if own is None else snapshot.residencies.get(own)
    own_bytes = dict(bytes_by_gpu(snapshot, own_replica)) if own_replica is not None else {}
    shortfall = {gpu: size - own_bytes.get(gpu, 0) for gpu, size in _shortfall(snapshot, need)}
    gpus = [gpu for gpu, size in shortfall.items() if size > 0]
    others = evictable(snapshot, gpus, busy=busy, young=young) if gpus else []
    if own_replica is not None:
        others = [r for r in others if (r.instance, r.blob) != own]
    if supersedes:
        others = sorted(others, key=lambda r: (r.instance, r.blob) not in supersedes)
    evict = choose_evictions(snapshot, shortfall, others)
    if evict is None:
        # The estimates may be low, and then unloading all that is there would never seem to be enough.
        less = {gpu: size - underestimated_bytes(snapshot, gpu) for gpu, size in shortfall.items()}
        evict = choose_evictions(snapshot, less, others) if less != shortfall else None
    if evict is None:
        return None
    price = price_of(snapshot, (key for key in evict if key not in supersedes))
    evict = (own, *evict) if own is not None and own_replica is not None else evict
    return _with_relied_on(snapshot, need, evict, price)


def most_room(snapshot: Snapshot, *, busy: bool, young: bool) -> Mapping[GpuUuid, int]:
    """Bytes that each GPU has for a load once all models on it that may leave have left. What does not fit there gets
    no offer, which the search for the cheapest models would find out as well."""
    return memoise(
        snapshot,
        (most_room, busy, young),
        lambda: {gpu: _freed_at_most(snapshot, gpu, busy=busy, young=young) for gpu in snapshot.gpus},
    )


def _freed_at_most(snapshot: Snapshot, gpu: GpuUuid, *, busy: bool, young: bool) -> int:
    leaving, freed = evictable(snapshot, (gpu,), busy=busy, young=young), freed_by_replica(snapshot)
    size = sum(freed[r.instance, r.blob].get(gpu, 0) for r in leaving)
    return _room(snapshot)[gpu] + size + underestimated_bytes(snapshot, gpu)


def _room(snapshot: Snapshot) -> Mapping[GpuUuid, int]:
    """Bytes of each GPU that are free, or will be without another unload."""
    return memoise(
        snapshot,
        _room,
        lambda: {gpu: size + leaving_bytes(snapshot, gpu) for gpu, size in free_room(snapshot).items()},
    )


def _shortfall(snapshot: Snapshot, need: Need) -> Iterator[tuple[GpuUuid, int]]:
    """Bytes that models on each GPU have to free, by our accounting, where anything has to leave."""
    room, overcounted = _room(snapshot), memoise(snapshot, _shortfall, lambda: _overcounted(snapshot))
    for gpu, size in need:
        missing = size - room.get(gpu, 0)
        if missing > 0:
            yield gpu, missing + overcounted.get(gpu, 0)


def _overcounted(snapshot: Snapshot) -> dict[GpuUuid, int]:
    return {gpu: overcounted_bytes(snapshot, gpu) for gpu in snapshot.gpus}


def _relied_on(snapshot: Snapshot, need: Need) -> list[ResidencyKey]:
    """Models whose leaving another plan has asked for and this one counts on: it asks for it as well, lest the room
    stays taken if that plan is dropped."""
    if not promised(snapshot):
        return []
    room = free_room(snapshot)
    short = {gpu for gpu, size in need if room.get(gpu, 0) < size}
    return sorted(
        key
        for key in promised(snapshot)
        if key in snapshot.residencies
        and snapshot.residencies[key].state is ResidencyState.READY
        and short.intersection(gpus_of(snapshot, key[0]))
    )
