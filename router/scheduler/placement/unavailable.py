"""What a model that fits nowhere now could use if it came back: lost GPUs, servers, memory that other programs hold.

Such a request is to be repeated later, other than one for a model that is too large for the machine. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.request import RunnerOptions
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import lost_gpus
from router.domain.vram_ledger import capacity_bytes, external_bytes, nominal_bytes, underestimated_bytes
from router.scheduler.placement.candidates import Bounds
from router.scheduler.placement.explain import bytes_text, explain_state, gpu_label

_TAKEN_RATIO = 0.05
"""Share of a GPU's memory above which other programs count as in the way: a desktop takes less, and stays."""


def explain_unavailable(
    snapshot: Snapshot, estimate: Estimate, model: ModelFacts, options: RunnerOptions, bounds: Bounds
) -> str | None:
    """What is out of service and could hold the model; None where nothing of it could."""
    for spec in _down(snapshot, bounds):
        if (
            model.is_on(spec)
            and bounds.allows(snapshot, spec.gpus)
            and _holds(snapshot, estimate, model, options, spec)
        ):
            return _reason(snapshot, spec)
    return None


def _down(snapshot: Snapshot, bounds: Bounds) -> Iterator[InstanceSpec]:
    """Instances that do not serve, and those that could be started if no GPU were lost or drained."""
    for view in snapshot.instances.values():
        if view.state is not InstanceState.READY:
            yield view.spec
    like = snapshot.policy.on_demand_like
    if not snapshot.policy.instances_on_demand or like is None or like.engine != bounds.engine:
        return
    gpus = sorted(snapshot.gpus.values(), key=lambda gpu: gpu.index)
    for size in range(1, len(gpus) + 1):
        for chosen in combinations(gpus, size):
            if any(_is_out(snapshot, gpu) for gpu in chosen):
                tuned = snapshot.engines[like.engine].tuned_for(like, list(chosen))
                uuids = tuple(gpu.uuid for gpu in chosen)
                yield replace(tuned, name=InstanceName(""), gpus=uuids, num_parallel=1, on_demand=True)


def _is_out(snapshot: Snapshot, gpu: Gpu) -> bool:
    return gpu.error is not None or snapshot.drained.has_gpu(gpu.uuid)


def _holds(
    snapshot: Snapshot, estimate: Estimate, model: ModelFacts, options: RunnerOptions, spec: InstanceSpec
) -> bool:
    context = snapshot.engines[spec.engine].context_length(options, model, spec)
    needed = estimate(model, spec, context, snapshot)
    return all(_largest_bytes(snapshot, gpu) >= size for gpu, size in zip(spec.gpus, needed, strict=True))


def _largest_bytes(snapshot: Snapshot, uuid: GpuUuid) -> int:
    """What the GPU could give if it were not lost."""
    gpu = snapshot.gpus.get(uuid)
    if gpu is None:
        return 0
    return capacity_bytes(snapshot, uuid) if gpu.error is None else nominal_bytes(snapshot, uuid)


def _reason(snapshot: Snapshot, spec: InstanceSpec) -> str:
    lost = lost_gpus(snapshot.gpus, spec)
    if lost:
        return ", ".join(f"GPU {gpu.index} is lost ({gpu.error})" for gpu in lost)
    drained = [
        snapshot.drained.reason_of(uuid) or f"GPU {gpu.index} is drained"
        for uuid in spec.gpus
        if (gpu := snapshot.gpus.get(uuid)) and snapshot.drained.has_gpu(uuid)
    ]
    if drained:
        return ", ".join(drained)
    return explain_state(snapshot.instances[spec.name])


def taken_by_others(snapshot: Snapshot) -> dict[GpuUuid, int]:
    """Bytes that other programs hold, of the GPUs of which they hold a noticeable share."""
    found = {uuid: external_bytes(snapshot, uuid) - underestimated_bytes(snapshot, uuid) for uuid in snapshot.gpus}
    return {uuid: size for uuid, size in found.items() if size > _TAKEN_RATIO * snapshot.gpus[uuid].memory_total_bytes}


def without_others(snapshot: Snapshot, taken: Mapping[GpuUuid, int]) -> Snapshot:
    """The same machine as if those programs had ended."""
    freed = {
        uuid: replace(
            snapshot.gpus[uuid],
            memory_used_bytes=snapshot.gpus[uuid].memory_used_bytes - size,
            memory_free_bytes=snapshot.gpus[uuid].memory_free_bytes + size,
        )
        for uuid, size in taken.items()
    }
    return replace(snapshot, gpus={**snapshot.gpus, **freed})


def explain_taken(snapshot: Snapshot, taken: Mapping[GpuUuid, int]) -> str:
    """Such as `other programs hold 19.7 GiB of GPU 0`."""
    parts = [f"{bytes_text(size)} of GPU {gpu_label(snapshot, uuid)}" for uuid, size in taken.items()]
    return "other programs hold " + " and ".join(parts)
