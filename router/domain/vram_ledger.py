"""VRAM and slot accounting over a snapshot: what each GPU has left, and who holds what.

The figures come from three sources that never overlap: what the driver shows as free, what loads under way have
reserved but not yet taken, and a margin. The router's own books, not a server's estimate, are the authority, because
from v0.30 an Ollama server does not read again what a sibling took on its GPU.

It only answers questions; state is changed by the dispatcher.
"""

from __future__ import annotations

from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import gpu_index

_UNACCOUNTED = 1.05
"""So much more than the books say is taken for ours, not for foreign use, when it is asked what a GPU could give:
estimates are within 5 % of what loads take."""


def reserved_bytes(snapshot: Snapshot, uuid: GpuUuid, besides: LoadId | None = None) -> int:
    """Bytes on `uuid` set aside for loads whose memory the last reading of the GPUs cannot show yet."""
    reserved = gpu_index(snapshot, uuid).reserved
    left_out = snapshot.reservations.get(besides) if besides is not None else None
    if left_out is None:
        return reserved
    return reserved - sum(size for owner, size in left_out.per_gpu_bytes if owner == uuid)


def available_bytes(snapshot: Snapshot, uuid: GpuUuid, besides: LoadId | None = None) -> int:
    """What a new load may take of `uuid` now: live free less the margin less reservations; may be negative."""
    gpu = snapshot.gpus.get(uuid)
    if gpu is None or gpu.error is not None:
        return 0
    margin = snapshot.policy.vram_margin_bytes
    return gpu.memory_free_bytes - margin - reserved_bytes(snapshot, uuid, besides)


def room_bytes(snapshot: Snapshot, uuid: GpuUuid, planned: Reservation) -> int:
    """What a planned load may take of `uuid` now: what loads under way and plans older than it leave of it.

    A younger plan never holds an older one up, nor takes the room that was cleared for it.
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
    """Bytes on `uuid` held by models that are loaded, as far as the router knows."""
    return gpu_index(snapshot, uuid).resident


def leaving_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes on `uuid` that models on their way out give back, and those whose room is promised to a planned load."""
    sums, gpu = gpu_index(snapshot, uuid), snapshot.gpus.get(uuid)
    # What the driver no longer shows as used has come back already.
    return max(0, min(sums.leaving, gpu.memory_used_bytes - sums.staying)) if gpu is not None else 0


def external_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes on `uuid` in use by others: what the driver shows used less what the router's models hold."""
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    return max(0, gpu.memory_used_bytes - resident_bytes(snapshot, uuid))


def unbooked_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """Bytes in use on `uuid` that are in no book and yet, being few, are taken for our models': they go with them."""
    return min(external_bytes(snapshot, uuid), int(resident_bytes(snapshot, uuid) * (_UNACCOUNTED - 1)))


def unaccounted_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """By how much the books have `uuid` hold more than the driver shows as used: 0 where they agree.

    What the driver shows and the books do not have is foreign use. With an unload under way both may be off for one
    reading.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    return max(0, resident_bytes(snapshot, uuid) - gpu.memory_used_bytes)


def capacity_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """What `uuid` could give if every model of ours left it and every load under way were gone.

    With a load under way part of its memory already shows as used; that part is not taken for foreign use, so
    capacity is never understated because of our own doing.
    """
    gpu = snapshot.gpus.get(uuid)
    if gpu is None or gpu.error is not None:
        return 0
    sums = gpu_index(snapshot, uuid)
    ours = int((sums.resident + sums.loading) * _UNACCOUNTED)
    usable = gpu.memory_free_bytes + min(gpu.memory_used_bytes, ours) - sums.kept
    return max(0, usable - snapshot.policy.vram_margin_bytes)


def is_settled(reservation: Reservation, gpus_read_at: float) -> bool:
    """True once the GPUs were read after the load ended: the driver's figures now contain it."""
    return reservation.finished_at is not None and gpus_read_at > reservation.finished_at
