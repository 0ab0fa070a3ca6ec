"""Restarts of instances that an operator requests: one at a time, under load.

Each instance goes through three phases. PREPARING: models that are in demand and loaded nowhere else are loaded on
other GPUs with free room, if there is any. DRAINING: the instance takes no new request and finishes what runs, for a
bounded time. STARTING: its server is started again. Requests for models that no other instance has wait meanwhile. If a
server does not come back, the instances after it are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from router.domain.actions import Action, Notice, RestartInstance
from router.domain.events import InstanceChanged, RestartRequested
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.residency import Residency, ResidencyState
from router.domain.restart import RestartPhase, RollingRestart
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import is_drained, replicas_of
from router.scheduler.placement.migration import place_beside
from router.scheduler.reconcile import reservations
from router.scheduler.reconcile.housekeeping import is_warm_wanted
from router.scheduler.state import FleetState

_REASON = "is drained and restarted: an operator requested it"
_PREPARE_SECONDS = 60.0
"""How long loads on other GPUs may delay a restart; longer than most loads take."""
_START_SECONDS = 180.0
"""Within this time a server has to be back, or the restart of the others is called off."""
_RUNNING = (InstanceState.READY, InstanceState.DRAINING)
_NEVER = float("inf")


def request(fleet: FleetState, event: RestartRequested) -> list[Action]:
    """Adds the instances to those that are restarted one after the other."""
    rolling = fleet.rolling or RollingRestart((), event.drain_timeout_seconds)
    new = tuple(name for name in event.instances if name not in rolling.pending and name != rolling.current)
    if not new:
        return []
    fleet.set_rolling(
        replace(rolling, pending=(*rolling.pending, *new), drain_timeout_seconds=event.drain_timeout_seconds)
    )
    return [Notice("restart_requested", {"instances": list(new)})]


def instance_changed(fleet: FleetState, event: InstanceChanged) -> list[Action]:
    """Notes that the current instance is back, or has failed."""
    rolling = fleet.rolling
    if rolling is None or rolling.current != event.spec.name or rolling.phase is not RestartPhase.STARTING:
        return []
    if event.state in (InstanceState.READY, InstanceState.STOPPED):
        fleet.set_rolling(replace(rolling, current=None))
    elif event.state is InstanceState.FATAL:
        return _call_off(fleet, rolling, f"{event.spec.name} does not start: {event.reason}")
    return []


def advance(fleet: FleetState, estimate: Estimate, new_load_id: Callable[[], LoadId], now: float) -> list[Action]:
    """Takes as many steps as can be taken now."""
    actions: list[Action] = []
    while fleet.rolling is not None:
        before = fleet.rolling
        actions += _step(fleet, before, estimate, new_load_id, now)
        if fleet.rolling is before:
            break
    return actions


def _step(
    fleet: FleetState, rolling: RollingRestart, estimate: Estimate, new_load_id: Callable[[], LoadId], now: float
) -> list[Action]:
    view = fleet.instances.get(rolling.current) if rolling.current is not None else None
    if view is None:
        return _next(fleet, rolling, now)
    match rolling.phase:
        case RestartPhase.PREPARING:
            return _prepare(fleet, rolling, view, estimate, new_load_id, now)
        case RestartPhase.DRAINING:
            if view.spec.name not in fleet.restarts_due:
                fleet.set_rolling(replace(rolling, phase=RestartPhase.STARTING, deadline=now + _START_SECONDS))
        case RestartPhase.STARTING:
            if now >= rolling.deadline:
                return _call_off(fleet, rolling, f"{view.spec.name} has not started within {_START_SECONDS:.0f} s")
    return []


def _next(fleet: FleetState, rolling: RollingRestart, now: float) -> list[Action]:
    if not rolling.pending:
        fleet.set_rolling(None)
        return [Notice("restart_finished", {})]
    name, *rest = rolling.pending
    following = replace(rolling, pending=tuple(rest), current=None, deadline=_NEVER)
    view = fleet.instances.get(name)
    if view is not None and view.state is InstanceState.FATAL:
        fleet.set_rolling(replace(following, current=name, phase=RestartPhase.STARTING, deadline=now + _START_SECONDS))
        return [RestartInstance(name, _REASON)]
    if name in fleet.lost_since:
        fleet.set_rolling(following)
        return [Notice("restart_skipped", {"instance": name, "reason": "its GPU is lost"})]
    if view is not None and view.state in _RUNNING:
        following = replace(following, current=name, phase=RestartPhase.PREPARING, deadline=now + _PREPARE_SECONDS)
    fleet.set_rolling(following)  # a server that is starting anyway is not restarted
    return []


def _call_off(fleet: FleetState, rolling: RollingRestart, reason: str) -> list[Action]:
    fleet.set_rolling(None)
    return [Notice("restart_called_off", {"reason": reason, "not_restarted": list(rolling.pending)})]


def _prepare(
    fleet: FleetState,
    rolling: RollingRestart,
    view: InstanceView,
    estimate: Estimate,
    new_load_id: Callable[[], LoadId],
    now: float,
) -> list[Action]:
    """Waits for replicas elsewhere while they are loading; then drains the instance."""
    actions: list[Action] = []
    name = view.spec.name
    if view.state not in _RUNNING:  # it has ended by itself, and is being started again
        fleet.set_rolling(replace(rolling, current=None))
        return actions
    if now < rolling.deadline and view.state is InstanceState.READY:
        snapshot = fleet.snapshot(now)
        for residency in _in_demand(snapshot, name):
            if any(r.state is not ResidencyState.READY for r in _elsewhere(snapshot, residency)):
                return actions
            placed = None if _elsewhere(snapshot, residency) else place_beside(snapshot, estimate, residency)
            if placed is not None:
                actions += reservations.begin(fleet, residency.model, placed, new_load_id(), now)
                return actions
    reservations.drain(fleet, view, _REASON, now)
    fleet.restarts_due[name] = now + rolling.drain_timeout_seconds
    fleet.set_rolling(replace(rolling, phase=RestartPhase.DRAINING, deadline=_NEVER))
    return actions


def _in_demand(snapshot: Snapshot, name: InstanceName) -> list[Residency]:
    return [
        residency
        for key, residency in snapshot.residencies.items()
        if key[0] == name and residency.state is ResidencyState.READY and is_warm_wanted(snapshot, residency.model)
    ]


def _elsewhere(snapshot: Snapshot, residency: Residency) -> list[Residency]:
    """Replicas of the same weights, loaded or on their way, on other instances that serve."""
    return [
        other
        for other in replicas_of(snapshot, residency.blob)
        if other.instance != residency.instance
        and other.state is not ResidencyState.UNLOADING
        and not is_drained(snapshot, other.instance)
        and _serves(snapshot, other.instance)
    ]


def _serves(snapshot: Snapshot, name: InstanceName) -> bool:
    view = snapshot.instances.get(name)
    return view is not None and view.state in (InstanceState.READY, InstanceState.STARTING)
