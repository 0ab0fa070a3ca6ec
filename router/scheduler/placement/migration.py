"""Moves models to other GPUs instead of only unloading them. Decides; changes nothing.

A model is moved in two cases: a plan evicts it although it is in demand, or other programs use so much of its GPU that
the GPU is short. If other GPUs have room without evictions, another replica is loaded there. The one here is unloaded
when it is idle (for a plan), or when the replica elsewhere serves (on a short GPU).
"""

from __future__ import annotations

from collections.abc import Iterator

from router.domain.actions import UnloadCause
from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import bytes_by_gpu, replicas_of
from router.domain.vram_ledger import available_bytes, external_bytes, is_settling
from router.scheduler.placement.candidates import widened_context
from router.scheduler.placement.cost import is_warm_wanted, other_replicas
from router.scheduler.placement.eviction import evictable
from router.scheduler.placement.placement import Placed, PlacementRequest, place

_EXTERNAL_MIN_MARGINS = 2
"""External VRAM below this number of margins is what drivers and desktops always use."""


def elsewhere(snapshot: Snapshot, estimate: Estimate, key: ResidencyKey) -> Placed | None:
    """Free room on other GPUs for a model that is evicted here and in demand.

    Returns None if there is no room or no demand.
    """
    residency = snapshot.residencies.get(key)
    if residency is None or not (residency.in_flight or is_warm_wanted(snapshot, residency.model)):
        return None
    return _free_place(snapshot, estimate, residency)


def find_move(snapshot: Snapshot, estimate: Estimate) -> tuple[Residency, Placed] | None:
    """The cheapest model to move off a short GPU, and its new place. One at a time: None while any load is planned."""
    if snapshot.reservations:
        return None
    for uuid in short_gpus(snapshot):
        for residency in evictable(snapshot, (uuid,), busy=True, young=True):
            found = _free_place(snapshot, estimate, residency)
            if found is not None:
                return residency, found
    return None


def superfluous(snapshot: Snapshot) -> Iterator[tuple[ResidencyKey, str, UnloadCause]]:
    """Idle models to unload on short GPUs, with the reason: a replica elsewhere serves, or there is no demand.

    At most one for each GPU.
    """
    for uuid in short_gpus(snapshot):
        for residency in evictable(snapshot, (uuid,), young=True):
            if _serves_elsewhere(snapshot, residency, uuid):
                why = "moved: others use the memory of its GPU"
                yield (residency.instance, residency.blob), why, UnloadCause.MOVED
                break
            if not is_warm_wanted(snapshot, residency.model) and residency.blob not in snapshot.wanted:
                why = "others need the memory of its GPU and nobody asks for it"
                yield (residency.instance, residency.blob), why, UnloadCause.EVICTED
                break


def short_gpus(snapshot: Snapshot) -> list[GpuUuid]:
    """GPUs where external VRAM leaves less than half of the margin, and no load of the router is in progress."""
    policy = snapshot.policy
    loading = {uuid for reservation in snapshot.reservations.values() for uuid, _ in reservation.per_gpu_bytes}
    return [
        uuid
        for uuid, gpu in snapshot.gpus.items()
        if gpu.error is None
        and uuid not in loading
        and not is_settling(snapshot, uuid)
        and available_bytes(snapshot, uuid) < -policy.vram_margin_bytes // 2
        and external_bytes(snapshot, uuid) >= _EXTERNAL_MIN_MARGINS * policy.vram_margin_bytes
    ]


def _free_place(snapshot: Snapshot, estimate: Estimate, residency: Residency) -> Placed | None:
    if len(replicas_of(snapshot, residency.blob)) > 1 or snapshot.policy.keeps_warm(residency.name):
        return None
    found = place_beside(snapshot, estimate, residency)
    return found if found is not None and found.per_gpu_bytes else None


def place_beside(snapshot: Snapshot, estimate: Estimate, residency: Residency) -> Placed | None:
    """Free room for another replica like this one on another instance."""
    request = PlacementRequest(
        residency.model,
        residency.options,
        price_max=0.0,
        not_on=frozenset({residency.instance}),
        default_context=widened_context(snapshot, snapshot.instances[residency.instance].spec),
    )
    found = place(snapshot, estimate, request)
    return found if isinstance(found, Placed) and not found.evict else None


def _serves_elsewhere(snapshot: Snapshot, residency: Residency, uuid: GpuUuid) -> bool:
    return any(uuid not in dict(bytes_by_gpu(snapshot, other)) for other in other_replicas(snapshot, residency))
