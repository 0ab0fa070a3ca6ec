"""Reasons in words: bytes needed and bytes there are, on which GPU, and how the instances are."""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.gpu import GpuUuid
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import available_bytes, capacity_bytes

GIB = 1024**3


def explain_fit(snapshot: Snapshot, need: Sequence[tuple[GpuUuid, int]]) -> str:
    """`GPU 0 needs 10.0 of 12.0 GiB free`, for each GPU."""
    if not need:
        return "no GPUs, runs on the CPU"
    return ", ".join(
        f"GPU {gpu_label(snapshot, uuid)} needs {size / GIB:.1f} of "
        f"{available_bytes(snapshot, uuid) / GIB:.1f} GiB free"
        for uuid, size in need
    )


def explain_shortfall(snapshot: Snapshot, need: Sequence[tuple[GpuUuid, int]]) -> str:
    """Bytes needed and bytes that the GPU could give, for each GPU."""
    return ", ".join(
        f"GPU {gpu_label(snapshot, uuid)} needs {size} bytes ({size / GIB:.1f} GiB) and can give "
        f"{capacity_bytes(snapshot, uuid)} bytes ({capacity_bytes(snapshot, uuid) / GIB:.1f} GiB)"
        for uuid, size in need
    )


def gpu_label(snapshot: Snapshot, uuid: GpuUuid) -> str:
    gpu = snapshot.gpus.get(uuid)
    return str(gpu.index) if gpu else uuid


def explain_states(snapshot: Snapshot) -> str:
    words = [
        f"{v.spec.name} is {v.state.value}" + (f" ({v.reason})" if v.reason else "")
        for v in snapshot.instances.values()
    ]
    return "; ".join(words) or "none is configured"
