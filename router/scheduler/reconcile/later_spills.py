"""Models that come to be partly on the CPU after their load: a server has reloaded one by itself, with too little room.

Such a model is slow for everybody, and stays so. It takes no new request, is unloaded when it is idle, and counts as a
load that spilled there: it is planned anew, smaller or elsewhere. Attached servers are left alone, because others use
them too.
"""

from __future__ import annotations

from router.domain.actions import Action, UnloadCause
from router.domain.instance import InstanceName
from router.domain.residency import ResidencyState, cpu_ratio
from router.domain.snapshot import Failure
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState


def mark(fleet: FleetState, name: InstanceName, now: float) -> None:
    """Finds them among the models that the instance has just listed."""
    view = fleet.instances.get(name)
    if view is None or view.spec.attached or not view.spec.gpus:
        return
    for key, replica in list(fleet.replicas.items()):
        if key[0] != name or key in fleet.spilled or replica.state is not ResidencyState.READY:
            continue
        if not rules.is_unasked_spill(fleet, replica.model, replica.size_bytes, replica.size_vram_bytes):
            continue
        share = 100.0 * cpu_ratio(replica.size_bytes, replica.size_vram_bytes)
        message = f"model '{replica.name}' has come to be {share:.0f} % on the CPU on {name}"
        fleet.spilled.add(key)
        fleet.remember_failure(Failure(*key, replica.options, 502, message, now, is_spilled=True))
        fleet.version += 1


def unload_idle(fleet: FleetState) -> list[Action]:
    """Unloads those that are idle, and forgets those that are gone."""
    actions: list[Action] = []
    for key in list(fleet.spilled):
        replica = fleet.residencies.get(key)
        if replica is not None and replica.is_idle:
            actions.append(rules.unload(fleet, key, "it has come to be partly on the CPU", UnloadCause.SPILLED))
        if replica is None or replica.state is not ResidencyState.READY:
            fleet.spilled.discard(key)
    return actions
