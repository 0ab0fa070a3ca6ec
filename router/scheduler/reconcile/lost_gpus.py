"""Lost GPUs: instances over a GPU that cannot be read take no new request until it is read again.

They are shown as draining. A short disturbance changes nothing else. After a longer one no model can have survived, and
a server that was started meanwhile does not see the GPU: servers that the router runs are restarted.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Action, RestartInstance
from router.domain.instance import InstanceState, InstanceView
from router.domain.snapshot_index import lost_gpus
from router.scheduler.reconcile import reservations
from router.scheduler.state import FleetState

_DISTURBANCE_SECONDS = 5.0
"""A GPU that is read again within this time kept its models: a driver may fail a single reading."""


def mark_instances(fleet: FleetState, now: float) -> list[Action]:
    """Takes instances over lost GPUs out of service, and brings those back whose GPUs are read again."""
    if not fleet.lost_since and all(gpu.error is None for gpu in fleet.gpus.values()):
        return []
    actions: list[Action] = []
    for name, view in list(fleet.instances.items()):
        lost = lost_gpus(fleet.gpus, view.spec)
        if lost:
            fleet.lost_since.setdefault(name, now)
            if view.state is InstanceState.READY:
                reservations.drain(fleet, view, f"GPU {lost[0].index} is lost: {lost[0].error}", now)
        elif name in fleet.lost_since:
            actions += _bring_back(fleet, view, now - fleet.lost_since.pop(name))
    fleet.lost_since = {name: at for name, at in fleet.lost_since.items() if name in fleet.instances}
    return actions


def _bring_back(fleet: FleetState, view: InstanceView, lost_seconds: float) -> list[Action]:
    name = view.spec.name
    fleet.version += 1
    if lost_seconds < _DISTURBANCE_SECONDS or view.spec.attached:
        if view.state is InstanceState.DRAINING and name not in fleet.restarts_due:
            fleet.put_instance(replace(view, state=InstanceState.READY, reason="", down_since=None))
        return []
    fleet.restarts_due.pop(name, None)
    return [RestartInstance(name, f"its GPU was lost for {lost_seconds:.0f} s")]
