"""Models that move to other cards instead of merely going.

Two occasions: a plan drives out a model that is asked for, and a card whose memory others have come to use. Where other
cards have room that costs nobody anything, a further copy is loaded there; the one here leaves as soon as it may: for
a plan when it is idle, on a card that is short when the copy elsewhere serves. It decides; it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu, copies_of
from router.domain.vram_ledger import available_bytes, foreign_bytes
from router.scheduler.placement.cost import other_copies
from router.scheduler.placement.eviction import evictable, is_pinned
from router.scheduler.placement.placement import Estimate, Placed, Want, place
from router.scheduler.reconcile.housekeeping import is_wanted_warm

_FOREIGN_LEAST_MARGINS = 2
"""Foreign use of less than so many margins is what drivers and desktops take anyway."""


def elsewhere(snapshot: Snapshot, estimate: Estimate, key: ResidencyKey) -> Placed | None:
    """Free room on other cards for a model that has to leave here and is asked for; None where there is none."""
    residency = snapshot.residencies.get(key)
    if residency is None or not (residency.in_flight or is_wanted_warm(snapshot, residency.model)):
        return None
    return _free_place(snapshot, estimate, residency)


def relieve(snapshot: Snapshot, estimate: Estimate) -> tuple[Residency, Placed] | None:
    """The cheapest model to move off a card that is short, and where to; one at a time."""
    if snapshot.reservations:
        return None
    for gpu in short_cards(snapshot):
        for residency in evictable(snapshot, (gpu,), busy=True, young=True):
            found = _free_place(snapshot, estimate, residency)
            if found is not None:
                return residency, found
    return None


def superfluous(snapshot: Snapshot) -> Iterator[tuple[ResidencyKey, str]]:
    """Idle models on cards that are short: with a copy elsewhere that serves, or not asked for any more."""
    for gpu in short_cards(snapshot):
        for residency in evictable(snapshot, (gpu,), young=True):
            if _serves_elsewhere(snapshot, residency, gpu):
                yield (residency.instance, residency.blob), "moved: others use the memory of its card"
                break
            if not is_wanted_warm(snapshot, residency.model) and residency.blob not in snapshot.wanted:
                yield (residency.instance, residency.blob), "others need the memory of its card and nobody asks for it"
                break


def short_cards(snapshot: Snapshot) -> list[GpuUuid]:
    """Cards on which others use so much that less than half the margin is left, and nothing of ours is changing."""
    policy = snapshot.policy
    if snapshot.now - snapshot.changed_at < policy.settle_seconds:
        return []
    under_way = {gpu for reservation in snapshot.reservations.values() for gpu, _ in reservation.per_gpu_bytes}
    return [
        gpu
        for gpu, card in snapshot.gpus.items()
        if card.error is None
        and gpu not in under_way
        and available_bytes(snapshot, gpu) < -policy.vram_margin_bytes // 2
        and foreign_bytes(snapshot, gpu) >= _FOREIGN_LEAST_MARGINS * policy.vram_margin_bytes
    ]


def _free_place(snapshot: Snapshot, estimate: Estimate, residency: Residency) -> Placed | None:
    if len(copies_of(snapshot, residency.blob)) > 1 or is_pinned(snapshot, residency):
        return None
    want = Want(residency.model, residency.options, price_max=0.0, not_on=frozenset({residency.instance}))
    found = place(snapshot, estimate, want)
    return found if isinstance(found, Placed) and found.per_gpu_bytes and not found.evict else None


def _serves_elsewhere(snapshot: Snapshot, residency: Residency, gpu: GpuUuid) -> bool:
    return any(gpu not in dict(bytes_by_gpu(snapshot, other)) for other in other_copies(snapshot, residency))
