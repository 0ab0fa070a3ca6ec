"""Sums and indices over one snapshot, each computed once and kept in the snapshot.

A search looks at many candidates for many models, and each needs the same sums. Because a snapshot does not change,
the results stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.model import BlobDigest
from router.domain.residency import Residency, ResidencyKey, ResidencyState, cpu_ratio, is_spill
from router.domain.snapshot import Snapshot

_Result = TypeVar("_Result")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class GpuTotals:
    """Bytes on one GPU by kind."""

    reserved: int = 0
    """Reserved for loads that the last reading of the GPUs does not show yet."""
    loading: int = 0
    """The part of `reserved` whose loads were sent."""
    running: int = 0
    """The part of `loading` whose loads have not ended: any of it may be in use already."""
    aborted: int = 0
    """The part of `reserved` whose loads were broken off."""
    resident: int = 0
    """Held by loaded and unloading models."""
    leaving: int = 0
    """Held by models that are unloading, or that planned loads will evict."""
    staying: int = 0
    """Held by all other loaded models."""
    unread: int = 0
    """The part of `staying` that the last reading of the GPUs does not show yet."""
    kept: int = 0
    """Held by models with `keep_warm`."""


_NO_TOTALS = GpuTotals()


def memoise(snapshot: Snapshot, key: object, compute: Callable[[], _Result]) -> _Result:
    """The value stored in this snapshot under `key`; computed at the first call."""
    found = snapshot.memo.get(key)
    if found is None:
        found = snapshot.memo[key] = compute()
    return found


def gpu_index(snapshot: Snapshot, gpu: GpuUuid) -> GpuTotals:
    """The totals of one GPU."""
    totals: Mapping[GpuUuid, GpuTotals] = memoise(snapshot, gpu_index, lambda: _totals_by_gpu(snapshot))
    return totals.get(gpu, _NO_TOTALS)


def gpus_of(snapshot: Snapshot, name: InstanceName) -> Sequence[GpuUuid]:
    """GPUs of the instance in its order; empty if the instance is gone."""
    view = snapshot.instances.get(name)
    return view.spec.gpus if view is not None else ()


def bytes_by_gpu(snapshot: Snapshot, residency: Residency) -> Iterable[tuple[GpuUuid, int]]:
    """Bytes that the model holds on each GPU of its instance."""
    return zip(gpus_of(snapshot, residency.instance), residency.per_gpu_bytes, strict=False)


def on_cpu_ratio(snapshot: Snapshot, residency: Residency) -> float | None:
    """The share of a loaded model that is on the CPU; None where its instance has no GPUs, or it is not loaded."""
    if residency.state not in (ResidencyState.READY, ResidencyState.UNLOADING):
        return None
    if not gpus_of(snapshot, residency.instance):
        return None
    sizes = residency.size_bytes, residency.size_vram_bytes
    return cpu_ratio(*sizes) if is_spill(residency.model, *sizes) else 0.0


def promised(snapshot: Snapshot) -> frozenset[ResidencyKey]:
    """Loaded models that planned loads will evict."""
    return memoise(snapshot, promised, snapshot.promised)


def overflow_instances(snapshot: Snapshot) -> frozenset[InstanceName]:
    """Instances that serve on the CPU what would be late on the GPUs. What they hold is no replica to others."""
    return memoise(
        snapshot,
        overflow_instances,
        lambda: frozenset(name for name, view in snapshot.instances.items() if view.spec.is_overflow),
    )


def replicas_of(snapshot: Snapshot, blob: BlobDigest) -> Sequence[Residency]:
    """Residencies of these weights, in any state; not those of CPU overflow."""
    by_blob: Mapping[BlobDigest, list[Residency]] = memoise(
        snapshot, replicas_of, lambda: _grouped((r.blob, r) for r in _replicas(snapshot))
    )
    return by_blob.get(blob, ())


def _replicas(snapshot: Snapshot) -> Iterable[Residency]:
    apart = overflow_instances(snapshot)
    if not apart:
        return snapshot.residencies.values()
    return (r for r in snapshot.residencies.values() if r.instance not in apart)


def residencies_of(snapshot: Snapshot, name: InstanceName) -> Sequence[ResidencyKey]:
    """Residencies on one instance, in any state."""
    by_name: Mapping[InstanceName, list[ResidencyKey]] = memoise(
        snapshot, residencies_of, lambda: _grouped((key[0], key) for key in snapshot.residencies)
    )
    return by_name.get(name, ())


def residencies_on(snapshot: Snapshot, gpu: GpuUuid) -> Sequence[ResidencyKey]:
    """Residencies on all instances that use this GPU."""
    by_gpu: Mapping[GpuUuid, list[ResidencyKey]] = memoise(
        snapshot,
        residencies_on,
        lambda: _grouped((gpu, key) for key in snapshot.residencies for gpu in gpus_of(snapshot, key[0])),
    )
    return by_gpu.get(gpu, ())


def lost_gpus(gpus: Mapping[GpuUuid, Gpu], spec: InstanceSpec) -> list[Gpu]:
    """GPUs of the instance that cannot be read."""
    return [gpu for uuid in spec.gpus if (gpu := gpus.get(uuid)) is not None and gpu.error is not None]


def serves_elsewhere(snapshot: Snapshot, blob: BlobDigest, name: InstanceName) -> bool:
    """Returns True if another instance than `name` serves requests for these weights now."""
    return any(
        replica.state is ResidencyState.READY
        and replica.instance != name
        and snapshot.instances[replica.instance].state is InstanceState.READY
        and (replica.instance, replica.blob) not in snapshot.draining
        for replica in replicas_of(snapshot, blob)
    )


def is_loading(snapshot: Snapshot, name: InstanceName) -> bool:
    """Returns True if a load runs on the instance."""
    return any(snapshot.residencies[key].state is ResidencyState.LOADING for key in residencies_of(snapshot, name))


def is_drained(snapshot: Snapshot, name: InstanceName) -> bool:
    """Returns True if an operator has taken the instance out of service."""
    view = snapshot.instances.get(name)
    return view is not None and snapshot.drained.covers(view.spec)


def instances_over(snapshot: Snapshot, gpus: frozenset[GpuUuid]) -> Sequence[InstanceView]:
    """Instances over exactly these GPUs, in the order of the snapshot."""
    by_gpus: Mapping[frozenset[GpuUuid], list[InstanceView]] = memoise(
        snapshot,
        instances_over,
        lambda: _grouped((frozenset(view.spec.gpus), view) for view in snapshot.instances.values()),
    )
    return by_gpus.get(gpus, ())


def _totals_by_gpu(snapshot: Snapshot) -> dict[GpuUuid, GpuTotals]:
    by_gpu: dict[GpuUuid, GpuTotals] = {}
    for reservation in snapshot.reservations.values():
        for gpu, size in reservation.per_gpu_bytes:
            totals = by_gpu.setdefault(gpu, GpuTotals())
            totals.reserved += size
            if reservation.sent_at is not None:
                totals.loading += size
                totals.running += size if reservation.finished_at is None else 0
            if reservation.aborted_at is not None:
                totals.aborted += size
    promised_keys = promised(snapshot)
    for key, residency in snapshot.residencies.items():
        is_kept = snapshot.policy.keeps_warm(residency.name)
        is_unread = residency.load_id in snapshot.reservations
        for gpu, size in bytes_by_gpu(snapshot, residency):
            totals = by_gpu.setdefault(gpu, GpuTotals())
            _add(totals, residency.state, size, key in promised_keys, is_unread, is_kept)
    return by_gpu


def _add(
    totals: GpuTotals, state: ResidencyState, size: int, is_promised: bool, is_unread: bool, is_kept: bool
) -> None:
    if state in (ResidencyState.READY, ResidencyState.UNLOADING):
        totals.resident += size
    if state is ResidencyState.UNLOADING or is_promised:
        totals.leaving += size
    elif state is ResidencyState.READY:
        totals.staying += size
        totals.unread += size if is_unread else 0
    if is_kept:
        totals.kept += size


def _grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    groups: dict[_Key, list[_Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
