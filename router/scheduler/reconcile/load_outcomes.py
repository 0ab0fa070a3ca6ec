"""Applies finished loads, finished unloads and instance changes to the state; returns the actions that follow.

A load that came out partly on the CPU is unloaded and remembered as a failure, never used; it is planned anew once. The
first load of a model that fails for memory raises the model's estimate instead, and the model is planned anew.
"""

from __future__ import annotations

from router.domain.actions import Action, ReadGpus, UnloadCause
from router.domain.events import InstanceChanged, LoadFailed, LoadFinished, UnloadFinished, UnloadRequested
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import BlobDigest
from router.domain.residency import ResidencyKey, ResidencyState, cpu_ratio
from router.domain.snapshot import Failure
from router.scheduler.reconcile import reservations, stuck_unloads
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState, expiry


def apply_to_loads(
    fleet: FleetState, event: LoadFinished | LoadFailed | UnloadFinished | UnloadRequested, now: float
) -> list[Action]:
    match event:
        case LoadFinished():
            return [*_load_finished(fleet, event, now), ReadGpus()]
        case LoadFailed():
            _load_failed(fleet, event, now)
            return [ReadGpus()]
        case UnloadFinished():
            return [*_unload_finished(fleet, event, now), ReadGpus()]
        case UnloadRequested():
            return _unload_asked(fleet, event, now)


def instance_changed(fleet: FleetState, event: InstanceChanged, now: float) -> None:
    name = event.spec.name
    before = fleet.instances.get(name)
    version = event.version or (before.version if before else None)
    fleet.version += 1
    if event.spec.on_demand and event.state is InstanceState.STOPPED:
        fleet.instances.pop(name, None)
        fleet.restarts_due.pop(name, None)
        fleet.forget_instance(name)
        return
    siblings = [view for view in fleet.instances.values() if view.spec.engine == event.spec.engine]
    if version is not None and not any(view.version for view in siblings):
        for plan in fleet.plans():
            reservations.drop(fleet, plan)  # its size and split were estimated without the server's version
    if event.state is InstanceState.READY and fleet.first_ready_at is None:
        fleet.first_ready_at = now
    down_since = _down_since(before, event.state, now)
    fleet.put_instance(InstanceView(event.spec, event.state, version, event.reason, down_since))
    fleet.restarts_due.pop(name, None)
    if event.spec.on_demand and event.state in (InstanceState.BACKOFF, InstanceState.FATAL):
        fleet.start_failed(frozenset(event.spec.gpus), now)
    if event.state in (InstanceState.READY, InstanceState.DRAINING):
        return
    if event.spec.on_demand and event.state is InstanceState.STARTING:
        return  # a plan waits for an instance that was started for it
    fleet.health.pop(name, None)
    if any(key[0] == name for key in fleet.replicas):
        fleet.memory_changed(name, now)  # the last reading of the GPUs still shows what it held
    fleet.forget_instance(name)


def _down_since(before: InstanceView | None, state: InstanceState, now: float) -> float | None:
    starts_first = before is None or (before.down_since is None and before.state is not InstanceState.READY)
    if state is InstanceState.READY or (state is InstanceState.STARTING and starts_first):
        return None
    return now if before is None or before.down_since is None else before.down_since


def _load_finished(fleet: FleetState, event: LoadFinished, now: float) -> list[Action]:
    residency = fleet.by_load(event.load_id)
    if residency is None or residency.state is ResidencyState.UNLOADING:
        return []  # it was broken off, and its unload is on its way
    key = (residency.instance, residency.blob)
    fleet.memory_changed(residency.instance, now)
    sent_at = fleet.reservations[event.load_id].sent_at
    if residency.instance not in fleet.overflow:
        fleet.loaded(residency.model.weights_bytes, now - (now if sent_at is None else sent_at))
    rules.finish_reservation(fleet, event.load_id, now)
    sizes = {"size_bytes": event.size_bytes, "size_vram_bytes": event.size_vram_bytes}
    until = expiry(residency.keep_alive_seconds, now)
    held = rules.at_least(residency.per_gpu_bytes, event.size_vram_bytes)
    fleet.update(
        key, state=ResidencyState.READY, loaded_at=now, used_at=now, expires_at=until, per_gpu_bytes=held, **sizes
    )
    if residency.per_gpu_bytes and rules.is_unasked_spill(fleet, residency.model, **sizes):
        share = 100.0 * cpu_ratio(event.size_bytes, event.size_vram_bytes)
        words = f"came out {share:.0f} % on the CPU on {residency.instance}"
        _remember_failure(fleet, key, 502, f"model '{residency.name}' {words}", now, is_spilled=True)
        return [rules.unload(fleet, key, words, UnloadCause.SPILLED)]
    return []


def _load_failed(fleet: FleetState, event: LoadFailed, now: float) -> None:
    residency = fleet.by_load(event.load_id)
    if residency is None or residency.state is ResidencyState.UNLOADING:
        return
    key = (residency.instance, residency.blob)
    fleet.memory_changed(residency.instance, now)
    if not (event.is_memory_short and _raises_estimate(fleet, residency.blob, now)):
        _remember_failure(fleet, key, event.status, event.message, now, is_lost=event.is_lost)
    fleet.forget(key)


def _raises_estimate(fleet: FleetState, blob: BlobDigest, now: float) -> bool:
    """Whether a load that failed for memory is planned anew, elsewhere or smaller; once until one is measured."""
    fleet.version += 1
    return fleet.footprints.raise_estimate(blob, now)


def _remember_failure(
    fleet: FleetState,
    key: ResidencyKey,
    status: int,
    message: str,
    now: float,
    *,
    is_lost: bool = False,
    is_spilled: bool = False,
) -> None:
    options = fleet.residencies[key].options
    fleet.remember_failure(Failure(key[0], key[1], options, status, message, now, is_lost, is_spilled))


def _unload_finished(fleet: FleetState, event: UnloadFinished, now: float) -> list[Action]:
    key = (event.instance, event.blob)
    residency = fleet.residencies.get(key)
    if residency is None or residency.state is not ResidencyState.UNLOADING:
        return []
    fleet.memory_changed(event.instance, now)
    if event.error is not None:
        return stuck_unloads.unload_failed(fleet, key, event.error, now)
    fleet.touched(event.instance)
    fleet.update(key, unloaded_at=now)
    if not residency.per_gpu_bytes:
        fleet.forget(key)
    return []


def _unload_asked(fleet: FleetState, event: UnloadRequested, now: float) -> list[Action]:
    actions: list[Action] = []
    fleet.dismissed.add(event.blob)
    for key, residency in list(fleet.residencies.items()):
        if fleet.policy.keeps_warm(residency.name) and not event.even_pinned:
            continue
        if residency.blob != event.blob or residency.state is ResidencyState.UNLOADING:
            continue
        if residency.in_flight or residency.state is not ResidencyState.READY:
            # A load on its way serves those who wait for it first.
            fleet.update(key, keep_alive_seconds=0.0, expires_at=now)
        else:
            actions.append(rules.unload(fleet, key, "a client asked for it", UnloadCause.REQUESTED))
    return actions
