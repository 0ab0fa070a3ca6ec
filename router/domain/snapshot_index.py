"""Sums and indices over one snapshot, worked out in one pass and kept with it.

A place is sought for many models at once, on many sets of GPUs each, from the same facts: what every candidate would
count again is counted here once. A snapshot holds still, so what was worked out from it stays true. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceView
from router.domain.model import BlobDigest
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot

Worked = TypeVar("Worked")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class GpuTotals:
    """Bytes on one GPU, by whose they are."""

    reserved: int = 0
    """For loads that the last reading of the GPUs cannot show yet."""
    loading: int = 0
    """The part of it whose load was sent."""
    resident: int = 0
    leaving: int = 0
    """Of models on their way out, and of those whose room is promised."""
    staying: int = 0
    kept: int = 0
    """Of models that are pinned to stay."""


NOTHING = GpuTotals()


def memoise(snapshot: Snapshot, what: object, work_out: Callable[[], Worked]) -> Worked:
    """The value that was worked out for this snapshot before, else what `work_out` gives now."""
    found = snapshot.memo.get(what)
    if found is None:
        found = snapshot.memo[what] = work_out()
    return found


def gpu_index(snapshot: Snapshot, gpu: GpuUuid) -> GpuTotals:
    sums: Mapping[GpuUuid, GpuTotals] = memoise(snapshot, gpu_index, lambda: _all_sums(snapshot))
    return sums.get(gpu, NOTHING)


def gpus_of(snapshot: Snapshot, name: InstanceName) -> Sequence[GpuUuid]:
    """Of the instance, in its order; none of one that is gone."""
    view = snapshot.instances.get(name)
    return view.spec.gpus if view is not None else ()


def bytes_by_gpu(snapshot: Snapshot, residency: Residency) -> Iterable[tuple[GpuUuid, int]]:
    """What the model holds of each GPU of its instance."""
    return zip(gpus_of(snapshot, residency.instance), residency.per_gpu_bytes, strict=False)


def promised(snapshot: Snapshot) -> frozenset[ResidencyKey]:
    """Loaded models whose room is promised to a load that is planned."""
    return memoise(snapshot, promised, snapshot.promised)


def replicas_of(snapshot: Snapshot, blob: BlobDigest) -> Sequence[Residency]:
    """Residencies of these weights, in whatever state."""
    by_blob: Mapping[BlobDigest, list[Residency]] = memoise(
        snapshot, replicas_of, lambda: _grouped((r.blob, r) for r in snapshot.residencies.values())
    )
    return by_blob.get(blob, ())


def residencies_of(snapshot: Snapshot, name: InstanceName) -> Sequence[ResidencyKey]:
    """What is loaded on that instance, or on its way in or out."""
    by_name: Mapping[InstanceName, list[ResidencyKey]] = memoise(
        snapshot, residencies_of, lambda: _grouped((key[0], key) for key in snapshot.residencies)
    )
    return by_name.get(name, ())


def residencies_on(snapshot: Snapshot, gpu: GpuUuid) -> Sequence[ResidencyKey]:
    """The same for all instances that have this GPU."""
    by_gpu: Mapping[GpuUuid, list[ResidencyKey]] = memoise(
        snapshot,
        residencies_on,
        lambda: _grouped((gpu, key) for key in snapshot.residencies for gpu in gpus_of(snapshot, key[0])),
    )
    return by_gpu.get(gpu, ())


def lost_gpus(gpus: Mapping[GpuUuid, Gpu], spec: InstanceSpec) -> list[Gpu]:
    """GPUs of the instance that cannot be read."""
    return [gpu for uuid in spec.gpus if (gpu := gpus.get(uuid)) is not None and gpu.error is not None]


def instances_over(snapshot: Snapshot, gpus: frozenset[GpuUuid]) -> Sequence[InstanceView]:
    """Instances on exactly these GPUs, in the order of the snapshot."""
    by_gpus: Mapping[frozenset[GpuUuid], list[InstanceView]] = memoise(
        snapshot,
        instances_over,
        lambda: _grouped((frozenset(view.spec.gpus), view) for view in snapshot.instances.values()),
    )
    return by_gpus.get(gpus, ())


def _all_sums(snapshot: Snapshot) -> dict[GpuUuid, GpuTotals]:
    sums: dict[GpuUuid, GpuTotals] = {}
    for reservation in snapshot.reservations.values():
        for gpu, size in reservation.per_gpu_bytes:
            found = sums.setdefault(gpu, GpuTotals())
            found.reserved += size
            if reservation.sent_at is not None:
                found.loading += size
    room = promised(snapshot)
    for key, residency in snapshot.residencies.items():
        pin = snapshot.policy.pins.get(residency.name)
        is_kept = pin is not None and pin.keep_warm
        for gpu, size in bytes_by_gpu(snapshot, residency):
            _add(sums.setdefault(gpu, GpuTotals()), residency.state, size, key in room, is_kept)
    return sums


def _add(sums: GpuTotals, state: ResidencyState, size: int, is_promised: bool, is_kept: bool) -> None:
    if state in (ResidencyState.READY, ResidencyState.UNLOADING):
        sums.resident += size
    if state is ResidencyState.UNLOADING or is_promised:
        sums.leaving += size
    elif state is ResidencyState.READY:
        sums.staying += size
    if is_kept:
        sums.kept += size


def _grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    found: dict[_Key, list[_Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
