"""VRAM reserved for a load that is planned or running."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest
from router.domain.residency import ResidencyKey


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes reserved for one load on all GPUs of its placement. Reservations are made and dropped as a whole."""

    load_id: LoadId
    instance: InstanceName
    blob: BlobDigest
    per_gpu_bytes: tuple[tuple[GpuUuid, int], ...]
    made_at: float
    sent_at: float | None = None
    """When the load was sent to the server; None while it is planned."""
    finished_at: float | None = None
    """When the load succeeded; the reservation is kept until a newer reading of the GPUs shows the bytes as used."""
    evict: tuple[ResidencyKey, ...] = ()
    """Models to unload first. Busy ones take no new request and are unloaded when they are idle."""
    cleared_at: float | None = None
    """When the last of these began to unload; the freed memory has to become visible within `room_timeout_seconds`."""
    is_unasked: bool = False
    """Whether nobody waits for the load, so that it gives way to those who need its room."""
    aborted_at: float | None = None
    """When the load was broken off; the reservation is kept until a reading of the GPUs shows the room."""
