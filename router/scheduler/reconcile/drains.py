"""What an operator drains: it takes no new request, finishes what runs, and its models are unloaded.

An instance is drained by its name or because of one of its GPUs, and is shown as draining. Models with `keep_warm` and
models in demand are loaded on other GPUs where they may be (`housekeeping.py`). Instances that were started on demand
are stopped once they are empty. After a resume everything is as before, except that the models have to be loaded again.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Action, Notice, UnloadCause
from router.domain.drained import DrainTarget
from router.domain.events import DrainRequested
from router.domain.instance import InstanceSpec, InstanceState
from router.scheduler.reconcile import reservations
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState


def change(fleet: FleetState, event: DrainRequested) -> list[Action]:
    """Drains or resumes. Logs only what changes something."""
    before, target = fleet.drained, event.target
    after = before.minus(target) if event.is_resumed else before.plus(target)
    if after == before:
        return []
    fleet.set_drained(after)
    words = _describe(fleet, target)
    return [Notice("resumed" if event.is_resumed else "drained", {"target": words})]


def bring_back(fleet: FleetState) -> None:
    """Puts instances back into service that are drained no more."""
    for name in list(fleet.taken_out):
        view = fleet.instances.get(name)
        if view is not None and fleet.drained.covers(view.spec):
            continue
        fleet.taken_out.discard(name)
        fleet.version += 1
        if view is not None and view.state is InstanceState.DRAINING and name not in fleet.restarts_due:
            fleet.put_instance(replace(view, state=InstanceState.READY, reason="", down_since=None))


def take_out(fleet: FleetState, now: float) -> None:
    """Takes drained instances out of service, also those that have just become ready."""
    if not fleet.drained:
        return
    gone = fleet.drained.instances - fleet.instances.keys()
    if gone:  # a name that is free again may be given to another instance
        fleet.set_drained(replace(fleet.drained, instances=fleet.drained.instances - gone))
    for name, view in list(fleet.instances.items()):
        if not fleet.drained.covers(view.spec):
            continue
        if view.state is InstanceState.READY:
            reservations.drain(fleet, view, reason(fleet, view.spec), now)
        if name not in fleet.taken_out:
            fleet.taken_out.add(name)
            reservations.drop_on(fleet, name)


def unload_idle(fleet: FleetState) -> list[Action]:
    """Unloads models that are idle on drained instances."""
    if not fleet.taken_out:
        return []
    actions: list[Action] = []
    for key, residency in list(fleet.residencies.items()):
        if key[0] in fleet.taken_out and residency.is_idle:
            actions.append(rules.unload(fleet, key, reason(fleet, fleet.instances[key[0]].spec), UnloadCause.DRAINED))
    return actions


def reason(fleet: FleetState, spec: InstanceSpec) -> str:
    """`GPU 1 is drained`, `drained by an operator`, or why the router has drained it."""
    indices = [str(fleet.gpus[gpu].index) for gpu in spec.gpus if gpu in fleet.drained.gpus and gpu in fleet.gpus]
    if indices and not fleet.drained.everything:
        return f"GPU {', '.join(indices)} is drained"
    unfit = [words for gpu in spec.gpus if (words := fleet.drained.reason_of(gpu))]
    is_by_operator = fleet.drained.everything or spec.name in fleet.drained.instances
    return ", ".join(unfit) if unfit and not is_by_operator else "drained by an operator"


def _describe(fleet: FleetState, target: DrainTarget) -> str:
    if target.gpu is not None:
        gpu = fleet.gpus.get(target.gpu)
        return f"GPU {gpu.index}" if gpu is not None else target.gpu
    return target.instance if target.instance is not None else "all"
