"""Reasons in words: bytes needed and bytes there are, on which card, and how the instances are."""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.gpu import GpuUuid
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import available_bytes, capacity_bytes

GIB = 1024**3


def fit_words(snapshot: Snapshot, need: Sequence[tuple[GpuUuid, int]]) -> str:
    """`card 0 needs 10.0 of 12.0 GiB free`, for each card."""
    if not need:
        return "no cards, runs on the CPU"
    return ", ".join(
        f"card {index_of(snapshot, gpu)} needs {size / GIB:.1f} of {available_bytes(snapshot, gpu) / GIB:.1f} GiB free"
        for gpu, size in need
    )


def short_words(snapshot: Snapshot, need: Sequence[tuple[GpuUuid, int]]) -> str:
    """Bytes needed and bytes that the card could give, for each card."""
    return ", ".join(
        f"card {index_of(snapshot, gpu)} needs {size} bytes ({size / GIB:.1f} GiB) and can give "
        f"{capacity_bytes(snapshot, gpu)} bytes ({capacity_bytes(snapshot, gpu) / GIB:.1f} GiB)"
        for gpu, size in need
    )


def index_of(snapshot: Snapshot, gpu: GpuUuid) -> str:
    card = snapshot.gpus.get(gpu)
    return str(card.index) if card else gpu


def states_words(snapshot: Snapshot) -> str:
    words = [
        f"{v.spec.name} is {v.state.value}" + (f" ({v.reason})" if v.reason else "")
        for v in snapshot.instances.values()
    ]
    return "; ".join(words) or "none is configured"
