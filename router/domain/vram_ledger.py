"""VRAM accounting over a snapshot: what each GPU has left, and what uses it. All figures are bytes.

Available memory is what the driver reports as free, minus reservations that no reading shows yet, minus a margin; no
byte is counted twice. The router decides by its own accounting and not by a server's estimate, because an Ollama server
from v0.30 on does not notice what another server has used on its GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.gpu import Gpu, GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceSpec
from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import gpu_index

_UNACCOUNTED = 1.05
"""Used memory up to this ratio of what our models are known to hold is attributed to them and not to other programs:
estimates are within 5 % of what loads use."""


def reserved_bytes(snapshot: Snapshot, uuid: GpuUuid, besides: LoadId | None = None) -> int:
    """Bytes reserved on `uuid` for loads that the last reading of the GPUs does not show yet, except load `besides`."""
    reserved = gpu_index(snapshot, uuid).reserved
    excluded = snapshot.reservations.get(besides) if besides is not None else None
    if excluded is None:
        return reserved
    return reserved - sum(size for owner, size in excluded.per_gpu_bytes if owner == uuid)


def available_bytes(snapshot: Snapshot, uuid: GpuUuid, besides: LoadId | None = None) -> int:
    """Bytes of `uuid` that a new load may use now: free minus margin minus reservations. May be negative.

    0 if the GPU is unknown or could not be read.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None or gpu.error is not None:
        return 0
    margin = snapshot.policy.vram_margin_bytes
    return gpu.memory_free_bytes - margin - reserved_bytes(snapshot, uuid, besides)


def room_bytes(snapshot: Snapshot, uuid: GpuUuid, planned: Reservation) -> int:
    """Bytes of `uuid` that a planned load may use now: free minus margin minus running loads and older plans.

    Younger plans are not subtracted: they must not delay an older one or take the room that was cleared for it.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None or gpu.error is not None:
        return 0
    ahead = sum(
        size
        for reservation in snapshot.reservations.values()
        if reservation.load_id != planned.load_id
        and (reservation.sent_at is not None or reservation.load_id < planned.load_id)
        for owner, size in reservation.per_gpu_bytes
        if owner == uuid
    )
    return gpu.memory_free_bytes - snapshot.policy.vram_margin_bytes - ahead


def resident_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes on `uuid` that the router's loaded and unloading models hold, by its own accounting."""
    return gpu_index(snapshot, uuid).resident


def leaving_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes on `uuid` that will be freed by models that are unloading, or that planned loads will evict."""
    totals, gpu = gpu_index(snapshot, uuid), snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    # Bytes that the driver no longer reports as used are already free. What is reserved for a load that was broken off
    # becomes available together with what that load has taken so far.
    staying = totals.staying - totals.unread
    return max(0, min(totals.leaving, gpu.memory_used_bytes - staying)) + totals.aborted


def overcounted_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """By how many bytes unloads on `uuid` may free less than our accounting says: models that stay are thought to hold
    more than the driver reports as used. 0 normally.

    As `leaving_bytes` counts what they free once they are under way.
    """
    totals, gpu = gpu_index(snapshot, uuid), snapshot.gpus.get(uuid)
    return 0 if gpu is None else max(0, totals.staying - totals.unread - gpu.memory_used_bytes)


def external_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes on `uuid` used by other programs: what the driver reports as used minus what the router's models hold.

    A running load fills its reservation bit by bit: used memory up to that is attributed to it.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    totals = gpu_index(snapshot, uuid)
    return max(0, gpu.memory_used_bytes - totals.resident - totals.running)


def underestimated_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes that our models probably hold beyond their estimates, and free with them; part of `external_bytes`."""
    return min(external_bytes(snapshot, uuid), int(resident_bytes(snapshot, uuid) * (_UNACCOUNTED - 1)))


def unaccounted_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """By how many bytes our accounting for `uuid` exceeds what the driver reports as used; 0 normally.

    The opposite difference is external use (`external_bytes`). During an unload both may be wrong for one reading.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    return max(0, resident_bytes(snapshot, uuid) - gpu.memory_used_bytes)


def capacity_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes that `uuid` could give if all our models without `keep_warm` were unloaded and no load were running.

    The memory of a running load is partly used already. It is attributed to that load and not to other programs, so
    that our own loads never reduce the capacity.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None or gpu.error is not None:
        return 0
    totals = gpu_index(snapshot, uuid)
    ours = int((totals.resident + totals.loading) * _UNACCOUNTED)
    usable = gpu.memory_free_bytes + min(gpu.memory_used_bytes, ours) - totals.kept
    return max(0, usable - snapshot.policy.vram_margin_bytes)


def nominal_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes that `uuid` could give if nothing else used it, whether it can be read now or not."""
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    return max(0, gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0) - snapshot.policy.vram_margin_bytes)


def is_settling(snapshot: Snapshot, uuid: GpuUuid) -> bool:
    """Returns True for a while after a load or an unload on `uuid`: the driver may still report old figures."""
    changed_at = snapshot.changed_on.get(uuid, float("-inf"))
    return snapshot.now - changed_at < snapshot.policy.constants.settle_seconds


def process_bytes(gpus: Sequence[Gpu | None], spec: InstanceSpec) -> tuple[int, ...] | None:
    """What the processes of an instance's server hold on each of its GPUs, CUDA contexts included, by the driver.

    None where the driver does not tell it, or none of its processes is known.
    """
    written, sizes = spec.url.rpartition(":")[2], list[int]()
    port = int(written) if written.isdecimal() else None
    for gpu in gpus:
        if gpu is None or gpu.error is not None:
            return None
        used = [process.used_bytes for process in gpu.processes if port in process.server_ports]
        known = [size for size in used if size is not None]
        if len(known) < len(used):
            return None
        sizes.append(sum(known))
    return tuple(sizes) if any(sizes) else None


def is_settled(reservation: Reservation, gpus_read_at: float) -> bool:
    """Returns True if the GPUs were read after the load ended, so that the driver's figures contain it."""
    return reservation.finished_at is not None and gpus_read_at > reservation.finished_at
