"""Unloads that keep failing: after two failures the room is obtained in another way.

A server that the router runs takes no new request, may finish its running ones, and is restarted, which frees its
memory. A server that something else runs cannot be restarted: what the model holds there is written off as external
VRAM, so that loads are planned elsewhere, and the unload is repeated now and then.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Action, Notice, RestartInstance
from router.domain.instance import InstanceState, InstanceView
from router.domain.residency import STUCK_AFTER_FAILURES, ResidencyKey, ResidencyState
from router.scheduler.reconcile import reservations
from router.scheduler.state import FleetState


def unload_failed(fleet: FleetState, key: ResidencyKey, error: str, now: float) -> list[Action]:
    """Schedules the next attempt, or gives up on unloading the replica."""
    constants = fleet.policy.constants
    failures, reason = fleet.residencies[key].unload_failures + 1, f"cannot be unloaded: {error}"
    # It stays out of use, as a model that spilled must.
    fleet.update(key, unload_failures=failures, reason=reason, expires_at=now + constants.room_timeout_seconds)
    if failures < STUCK_AFTER_FAILURES:
        return []
    view = fleet.instances[key[0]]
    if view.spec.attached:
        return _write_off(fleet, key, now, error, is_first=failures == STUCK_AFTER_FAILURES)
    fleet.update(key, expires_at=None)
    return _drain(fleet, key, view, now, error)


def _write_off(fleet: FleetState, key: ResidencyKey, now: float, error: str, *, is_first: bool) -> list[Action]:
    load_id = fleet.residencies[key].load_id
    if load_id is not None:
        fleet.drop_reservation(load_id)  # of a load that was broken off
    fleet.update(key, per_gpu_bytes=(), expires_at=now + fleet.policy.constants.failure_memory_seconds)
    gpus = set(fleet.instances[key[0]].spec.gpus)
    for plan in fleet.plans():
        if any(gpu in gpus for gpu, _ in plan.per_gpu_bytes):
            reservations.drop(fleet, plan)  # it may count on that memory
    if not is_first:
        return []
    fields = {"instance": key[0], "model": fleet.residencies[key].name, "error": error}
    return [Notice("vram_written_off", fields)]


def _drain(fleet: FleetState, key: ResidencyKey, view: InstanceView, now: float, error: str) -> list[Action]:
    name = key[0]
    if view.state is InstanceState.DRAINING and name not in fleet.taken_out:
        return []
    reason = f"is drained and restarted: {fleet.residencies[key].name} cannot be unloaded: {error}"
    reservations.drain(fleet, view, reason, now)
    fleet.restarts_due[name] = now + fleet.policy.constants.restart_drain_seconds
    return [Notice("instance_draining", {"instance": name, "reason": reason})]


def restart_drained(fleet: FleetState, now: float) -> list[Action]:
    """Restarts the instances that have drained, or have taken too long to."""
    actions: list[Action] = []
    for name, deadline in list(fleet.restarts_due.items()):
        if now < deadline and any(_is_busy(fleet, key) for key in fleet.replicas if key[0] == name):
            continue
        del fleet.restarts_due[name]
        view = fleet.instances[name]
        fleet.put_instance(replace(view, down_since=now))  # requests wait for its start from now on
        fleet.version += 1
        actions.append(RestartInstance(name, view.reason))
    return actions


def _is_busy(fleet: FleetState, key: ResidencyKey) -> bool:
    replica = fleet.replicas[key]
    return replica.state is ResidencyState.LOADING or (fleet.uses.get(key) or replica).in_flight > 0
