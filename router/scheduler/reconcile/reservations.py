"""Planned loads: room is reserved on all GPUs at once, what occupies it is unloaded, then the load is sent.

A plan is a reservation that was not sent yet, with a residency in PLANNED. Idle models that have to leave are unloaded
at once; busy ones take no new request and are unloaded when idle. The room of a plan is given to nothing else. A plan
is dropped when no ticket waits for it any more, or when its room does not show in time.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Action, StartInstance
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyState
from router.scheduler.placement.placement import Placed
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState


def begin(fleet: FleetState, model: ModelFacts, placed: Placed, load_id: LoadId, now: float) -> list[Action]:
    """Records the plan. Returns the start of its instance where it needs one, and the first unloads."""
    actions: list[Action] = []
    if placed.start is not None:
        spec = placed.start
        fleet.put_instance(InstanceView(spec, InstanceState.STARTING))
        actions.append(StartInstance(spec, placed.reason))
    own = (placed.instance, model.blob)
    if own in placed.evict:
        # The same weights with other options: planned again once that replica is gone.
        unloads = [key for key in placed.evict if fleet.residencies[key].is_idle]
        return [*actions, *(rules.make_room(fleet, key, model) for key in unloads)]
    spec = fleet.instances[placed.instance].spec
    needed = placed.per_gpu_bytes
    fleet.put_reservation(Reservation(load_id, placed.instance, model.blob, needed, now, evict=placed.evict))
    fleet.put_residency(rules.planned(fleet, model, placed, spec, load_id, now))
    fleet.version += 1
    return actions


def advance(fleet: FleetState, now: float) -> list[Action]:
    """Unloads what became idle for a plan, sends loads whose room is free, and drops plans that cannot succeed."""
    actions: list[Action] = []
    for reservation in fleet.plans():
        residency = fleet.residencies.get((reservation.instance, reservation.blob))
        if residency is None or residency.load_id != reservation.load_id:
            fleet.drop_reservation(reservation.load_id)
            fleet.version += 1
            continue
        actions += _advance(fleet, reservation, residency, now)
    return actions


def _advance(fleet: FleetState, reservation: Reservation, residency: Residency, now: float) -> list[Action]:
    actions: list[Action] = []
    for key in reservation.evict:
        found = fleet.residencies.get(key)
        if found is not None and found.is_idle:
            actions.append(rules.make_room(fleet, key, residency.model))
    staying = [fleet.residencies[key] for key in reservation.evict if key in fleet.residencies]
    if any(found.state is ResidencyState.READY for found in staying):
        return actions
    if reservation.cleared_at is None:
        reservation = replace(reservation, cleared_at=now)
        fleet.put_reservation(reservation)
    if not staying and rules.has_room(fleet.snapshot(now), reservation) and _may_send(fleet):
        actions.append(rules.send(fleet, residency, reservation, now))
    elif now - (reservation.cleared_at or now) >= fleet.policy.constants.room_timeout_seconds and not _is_coming(
        fleet, reservation
    ):
        drop(fleet, residency)
    return actions


def _may_send(fleet: FleetState) -> bool:
    under_way = sum(r.state is ResidencyState.LOADING for r in fleet.residencies.values())
    return under_way < fleet.policy.concurrent_loads_max


def _is_coming(fleet: FleetState, reservation: Reservation) -> bool:
    view = fleet.instances.get(reservation.instance)
    return view is not None and view.state is InstanceState.STARTING


def drop(fleet: FleetState, plan: Reservation | Residency) -> None:
    """Drops a plan and releases its room."""
    fleet.forget((plan.instance, plan.blob))


def drain(fleet: FleetState, view: InstanceView, reason: str, now: float) -> None:
    """Takes an instance out of service: it takes no new request, and the loads planned there are dropped."""
    fleet.put_instance(replace(view, state=InstanceState.DRAINING, reason=reason, down_since=now))
    drop_on(fleet, view.spec.name)
    fleet.version += 1


def drop_on(fleet: FleetState, name: InstanceName) -> None:
    """Drops the plans for an instance, to be planned elsewhere."""
    for plan in fleet.plans():
        if plan.instance == name:
            drop(fleet, plan)


def next_timeout(fleet: FleetState) -> float | None:
    """When the next plan is dropped unless its room has shown by then."""
    timeout = fleet.policy.constants.room_timeout_seconds
    return min((plan.cleared_at + timeout for plan in fleet.plans() if plan.cleared_at is not None), default=None)
