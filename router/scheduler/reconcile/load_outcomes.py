"""Applies finished loads, finished unloads and instance changes to the state; returns the actions that follow.

A load that came out partly on the CPU is unloaded and remembered as a failure, never used. The first load of a model
that fails for memory, or comes out so, raises the model's estimate instead, and the model is planned anew.
"""

from __future__ import annotations

from router.domain.actions import Action, ReadGpus
from router.domain.events import InstanceChanged, LoadFailed, LoadFinished, UnloadFinished, UnloadRequested
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import BlobDigest
from router.domain.residency import ResidencyKey, ResidencyState
from router.domain.snapshot import Failure
from router.scheduler.placement.eviction import is_pinned
from router.scheduler.reconcile import reservations
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
            _unload_finished(fleet, event, now)
            return [ReadGpus()]
        case UnloadRequested():
            return _unload_asked(fleet, event, now)


def instance_changed(fleet: FleetState, event: InstanceChanged, now: float) -> None:
    name = event.spec.name
    before = fleet.instances.get(name)
    version = event.version or (before.version if before else None)
    fleet.version += 1
    if event.spec.on_demand and event.state is InstanceState.STOPPED:
        fleet.instances.pop(name, None)
        fleet.forget_instance(name)
        return
    siblings = [view for view in fleet.instances.values() if view.spec.engine == event.spec.engine]
    if version is not None and not any(view.version for view in siblings):
        reservations.drop_all(fleet)  # sizes and splits were guessed without the server's version
    fleet.put_instance(InstanceView(event.spec, event.state, version, event.reason))
    if event.spec.on_demand and event.state in (InstanceState.BACKOFF, InstanceState.FATAL):
        fleet.start_failed(frozenset(event.spec.gpus), now)
    if event.state in (InstanceState.READY, InstanceState.DRAINING):
        return
    if event.spec.on_demand and event.state is InstanceState.STARTING:
        return  # a plan waits for an instance that was started for it
    if any(key[0] == name for key in fleet.replicas):
        fleet.memory_changed(now)  # the last reading of the GPUs still shows what it held
    fleet.forget_instance(name)


def _load_finished(fleet: FleetState, event: LoadFinished, now: float) -> list[Action]:
    residency = fleet.by_load(event.load_id)
    if residency is None:
        return []
    key = (residency.instance, residency.blob)
    fleet.memory_changed(now)
    sent_at = fleet.reservations[event.load_id].sent_at
    fleet.loaded(residency.model.weights_bytes, now - (now if sent_at is None else sent_at))
    rules.finish_reservation(fleet, event.load_id, now)
    sizes = {"size_bytes": event.size_bytes, "size_vram_bytes": event.size_vram_bytes}
    until = expiry(residency.keep_alive_seconds, now)
    held = rules.at_least(residency.per_gpu_bytes, event.size_vram_bytes)
    fleet.update(
        key, state=ResidencyState.READY, loaded_at=now, used_at=now, expires_at=until, per_gpu_bytes=held, **sizes
    )
    is_spilled = residency.per_gpu_bytes and event.size_vram_bytes < event.size_bytes
    if is_spilled and not fleet.engines[residency.model.engine].sets_own_layers(residency.model):
        share = 100.0 * (1 - event.size_vram_bytes / event.size_bytes)
        words = f"came out {share:.0f} % on the CPU on {residency.instance}"
        if not _raises_estimate(fleet, residency.blob, now):
            _remember_failure(fleet, key, 502, f"model '{residency.name}' {words}", now)
        return [rules.unload(fleet, key, words)]
    return []


def _load_failed(fleet: FleetState, event: LoadFailed, now: float) -> None:
    residency = fleet.by_load(event.load_id)
    if residency is None:
        return
    key = (residency.instance, residency.blob)
    fleet.memory_changed(now)
    if not (event.is_memory_short and _raises_estimate(fleet, residency.blob, now)):
        _remember_failure(fleet, key, event.status, event.message, now, is_lost=event.is_lost)
    fleet.forget(key)


def _raises_estimate(fleet: FleetState, blob: BlobDigest, now: float) -> bool:
    """Whether a load that failed for memory is planned anew, elsewhere or smaller; once until one is measured."""
    fleet.version += 1
    return fleet.footprints.raise_estimate(blob, now)


def _remember_failure(
    fleet: FleetState, key: ResidencyKey, status: int, message: str, now: float, *, is_lost: bool = False
) -> None:
    options = fleet.residencies[key].options
    fleet.remember_failure(Failure(key[0], key[1], options, status, message, now, is_lost))


def _unload_finished(fleet: FleetState, event: UnloadFinished, now: float) -> None:
    key = (event.instance, event.blob)
    residency = fleet.residencies.get(key)
    if residency is None or residency.state is not ResidencyState.UNLOADING:
        return
    fleet.memory_changed(now)
    if event.error is not None:
        # It stays out of use, which a model that spilled has to, and is tried again without haste.
        fleet.update(key, expires_at=now + fleet.policy.constants.room_timeout_seconds)
        return
    fleet.touched(event.instance)
    fleet.update(key, unloaded_at=now)
    if not residency.per_gpu_bytes:
        fleet.forget(key)


def _unload_asked(fleet: FleetState, event: UnloadRequested, now: float) -> list[Action]:
    actions: list[Action] = []
    fleet.dismissed.add(event.blob)
    for key, residency in list(fleet.residencies.items()):
        if is_pinned(fleet.snapshot(now), residency) and not event.even_pinned:
            continue
        if residency.blob != event.blob or residency.state is ResidencyState.UNLOADING:
            continue
        if residency.in_flight or residency.state is not ResidencyState.READY:
            # A load on its way serves those who wait for it first.
            fleet.update(key, keep_alive_seconds=0.0, expires_at=now)
        else:
            actions.append(rules.unload(fleet, key, "a client asked for it"))
    return actions
