"""Texts for users: bytes needed and available on each GPU, and the states of the instances."""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import gpus_of
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
    """What is needed of a GPU and what it could give at most, for each that cannot give it."""
    rooms = [(uuid, size, capacity_bytes(snapshot, uuid)) for uuid, size in need]
    return ", ".join(
        f"GPU {gpu_label(snapshot, uuid)} needs {bytes_text(size)} and can give {bytes_text(room)}"
        for uuid, size, room in [each for each in rooms if each[1] > each[2]] or rooms
    )


_WORDS = {
    ResidencyState.PLANNED: "room is being made for {r.name} on {r.instance}",
    ResidencyState.LOADING: "{r.name} is being loaded on {r.instance}",
    ResidencyState.UNLOADING: "{r.name} is being unloaded from {r.instance}",
}


def explain_obstacles(snapshot: Snapshot, gpus: Sequence[GpuUuid], model: ModelFacts) -> str:
    """What a model waits for that can have room on none of these GPUs now, whatever is evicted."""
    here = [
        r for r in snapshot.residencies.values() if not gpus or set(gpus).intersection(gpus_of(snapshot, r.instance))
    ]
    moving = [_WORDS[r.state].format(r=r) for r in here if r.state in _WORDS]
    if moving:
        return "waits because " + "; ".join(moving)
    down = [v for v in snapshot.instances.values() if v.state is not InstanceState.READY and model.is_on(v.spec)]
    if not gpus and down:
        return "waits for an instance: " + "; ".join(f"{v.spec.name} is {v.state.value}" for v in down)
    staying = [r.name for r in here if r.state is ResidencyState.READY and snapshot.policy.keeps_warm(r.name)]
    if staying:
        return f"waits for room beside {', '.join(staying)}, which is kept warm"
    return "waits until the GPUs show the room that was freed"


def gpu_label(snapshot: Snapshot, uuid: GpuUuid) -> str:
    """Index of the GPU; its UUID if it is unknown."""
    gpu = snapshot.gpus.get(uuid)
    return str(gpu.index) if gpu else uuid


def explain_states(snapshot: Snapshot) -> str:
    """`gpu0 is ready; gpu1 is backoff (exited with code 1)`."""
    return "; ".join(map(explain_state, snapshot.instances.values())) or "none is configured"


def explain_state(view: InstanceView) -> str:
    """`gpu1 is backoff (exited with code 1)`."""
    return f"{view.spec.name} is {view.state.value}" + (f" ({view.reason})" if view.reason else "")


def bytes_text(size: int) -> str:
    """`12.0 GiB`, for messages; documents have the bytes."""
    return f"{size / GIB:.1f} GiB"


def explain_drained(snapshot: Snapshot) -> str:
    """`; GPU 1 is drained`, to be appended to the reason of a wait; "" if nothing is drained."""
    drained = snapshot.drained
    if not drained:
        return ""
    gpus = sorted((gpu for gpu in snapshot.gpus.values() if gpu.uuid in drained.gpus), key=lambda gpu: gpu.index)
    return "; " + ", ".join(
        [
            *(f"GPU {gpu.index} is drained" for gpu in gpus),
            *(reason for _, reason in drained.unfit),
            *(f"{name} is drained" for name in sorted(drained.instances)),
        ]
    )
