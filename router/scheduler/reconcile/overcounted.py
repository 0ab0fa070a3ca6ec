"""Models that hold less than is booked for them: what another program took during a load was measured as theirs.

It shows when that program leaves: the GPU's memory in use is less than what our models are thought to hold there. No
model holds more than what is in use beside what the servers report of the others, so that bounds its booking, and what
was measured of such loads. A reading that leaves a model less than its own server reports is not believed: its runner
has died, and the router has not heard of it yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.domain.actions import Action, Remember
from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.scheduler.state import FleetState

_Held = list[tuple[Residency, int]]
"""Models that hold memory on one GPU, each with its bytes there."""


def correct(fleet: FleetState) -> list[Action]:
    """Lowers bookings that the newest reading of the GPUs refutes. Returns the footprints that change with them."""
    lowered: dict[ResidencyKey, dict[GpuUuid, int]] = {}
    for uuid, held in _held_by_gpu(fleet).items():
        for residency, size in _bounds(fleet, uuid, held):
            lowered.setdefault((residency.instance, residency.blob), {})[uuid] = size
    return [action for key, bounds in lowered.items() for action in _lower(fleet, fleet.residencies[key], bounds)]


def _held_by_gpu(fleet: FleetState) -> dict[GpuUuid, _Held]:
    found: dict[GpuUuid, _Held] = {}
    for residency in fleet.residencies.values():
        gpus = fleet.instances[residency.instance].spec.gpus
        for gpu, size in zip(gpus, residency.per_gpu_bytes, strict=False):
            found.setdefault(gpu, []).append((residency, size))
    return found


def _bounds(fleet: FleetState, uuid: GpuUuid, held: _Held) -> Iterator[tuple[Residency, int]]:
    """What models on the GPU hold at most, where that is less than what is booked."""
    gpu = fleet.gpus.get(uuid)
    if gpu is None or gpu.error is not None or sum(size for _, size in held) <= gpu.memory_used_bytes:
        return
    if not _is_at_rest(fleet, uuid, held):
        return
    reported = sum(_reported_bytes(residency) for residency, _ in held)
    for residency, size in held:
        most = gpu.memory_used_bytes - (reported - _reported_bytes(residency))
        if most < size:
            yield residency, most


def _is_at_rest(fleet: FleetState, uuid: GpuUuid, held: _Held) -> bool:
    """Whether the reading is newer than the last load and unload on the GPU, and none is planned or under way."""
    return (
        fleet.gpus_read_at > fleet.changed_on.get(uuid, float("-inf"))
        and all(r.state is ResidencyState.READY and r.loaded_at < fleet.gpus_read_at for r, _ in held)
        and not any(gpu == uuid for plan in fleet.reservations.values() for gpu, _ in plan.per_gpu_bytes)
    )


def _reported_bytes(residency: Residency) -> int:
    """What its server reports on its only GPU; 0 for one on several, of which the shares are not known."""
    return residency.size_vram_bytes if len(residency.per_gpu_bytes) == 1 else 0


def _lower(fleet: FleetState, residency: Residency, bounds: dict[GpuUuid, int]) -> list[Action]:
    spec = fleet.instances[residency.instance].spec
    sizes = tuple(
        min(size, bounds.get(gpu, size)) for gpu, size in zip(spec.gpus, residency.per_gpu_bytes, strict=True)
    )
    if not residency.size_vram_bytes or sum(sizes) < residency.size_vram_bytes or min(sizes) < 0:
        return []
    fleet.update((residency.instance, residency.blob), per_gpu_bytes=sizes)
    facts = fleet.snapshot(fleet.gpus_read_at)
    key = facts.engines[spec.engine].footprint_key(residency.model, spec, residency.context_length, facts)
    known = fleet.footprints.known.get(key)
    if known is None or known.parts:
        return []
    found = known._replace(per_gpu_bytes=tuple(map(min, known.per_gpu_bytes, sizes)))
    if found == known:
        return []
    fleet.footprints.remember(found)
    return [Remember(found)]
