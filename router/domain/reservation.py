"""VRAM set aside for a load under way."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest
from router.domain.residency import ResidencyKey


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes set aside on all GPUs of a placement for a load under way; all of them or none."""

    load_id: LoadId
    instance: InstanceName
    blob: BlobDigest
    per_gpu_bytes: tuple[tuple[GpuUuid, int], ...]
    made_at: float
    sent_at: float | None = None
    """When the load was sent to the server; None while room is being made."""
    finished_at: float | None = None
    """When the load ended well; kept until a reading of the GPUs newer than that shows the bytes used."""
    evict: tuple[ResidencyKey, ...] = ()
    """What has to leave first; busy models among them take no new request and leave when they are idle."""
    cleared_at: float | None = None
    """When the last of those began to leave; the room has to show soon after."""
