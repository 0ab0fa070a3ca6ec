"""What is done although no ticket waits: warm models are loaded, abandoned plans dropped, empty instances stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

from router.domain.actions import StopInstance
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import is_drained, overflow_instances
from router.scheduler.placement.candidates import is_empty
from router.scheduler.placement.cost import is_warm_wanted
from router.scheduler.placement.placement import Decision, NoFit, Placed, PlacementRequest, place
from router.scheduler.state import FleetState


def stop_empty(fleet: FleetState, now: float) -> Iterator[StopInstance]:
    """Stops instances that were started on demand and have been empty for `instance_idle_seconds`."""
    snapshot = fleet.snapshot(now)
    for name, view in list(fleet.instances.items()):
        if not view.spec.on_demand:
            continue
        if view.state in (InstanceState.BACKOFF, InstanceState.FATAL):
            yield _stop(fleet, view, f"does not run: {view.reason}")
            continue
        if name in fleet.taken_out and view.state is InstanceState.DRAINING and is_empty(snapshot, name):
            yield _stop(fleet, view, view.reason)
            continue
        if view.state is not InstanceState.READY:
            continue
        if not is_empty(snapshot, name):
            fleet.emptied_at.pop(name, None)
            continue
        since = fleet.emptied_at.setdefault(name, now)
        if now - since >= fleet.policy.instance_idle_seconds:
            del fleet.emptied_at[name]
            yield _stop(fleet, view, f"empty for {now - since:.0f} s")


def _stop(fleet: FleetState, view: InstanceView, reason: str) -> StopInstance:
    """Marks it as stopping, so that nothing is placed there and it is not stopped twice."""
    name = view.spec.name
    fleet.put_instance(replace(view, state=InstanceState.STOPPING))
    fleet.version += 1
    return StopInstance(name, reason)


def abandoned(snapshot: Snapshot) -> list[Residency]:
    """Plans that no ticket waits for, that are not to be kept warm and that are not unasked."""
    unasked = {r.load_id for r in snapshot.reservations.values() if r.is_unasked}
    return [
        r
        for r in snapshot.residencies.values()
        if r.state is ResidencyState.PLANNED
        and r.load_id not in unasked
        and r.blob not in snapshot.wanted
        and not is_warm_wanted(snapshot, r.model)
    ]


def _want(snapshot: Snapshot, model: ModelFacts) -> PlacementRequest:
    """In the context it is pinned to; others leave for it only where it is pinned."""
    pin = snapshot.policy.pins.get(model.name)
    price = float("inf") if snapshot.policy.keeps_warm(model.name) else 0.0
    options = snapshot.engines[model.engine].default_options(model, pin, snapshot.policy.context_length)
    return PlacementRequest(model, options, price_max=price)


def missing_warm(snapshot: Snapshot, models: Mapping[str, ModelFacts]) -> Iterator[ModelFacts]:
    """Yields the models that are pinned warm and neither loaded nor on their way, each of the same weights once."""
    coming = {
        r.blob
        for r in snapshot.residencies.values()
        if r.state is not ResidencyState.UNLOADING
        and not is_drained(snapshot, r.instance)
        and r.instance not in overflow_instances(snapshot)
    }
    for model in {model.blob: model for model in models.values()}.values():
        if model.blob not in coming and snapshot.policy.keeps_warm(model.name):
            yield model


def place_warm(snapshot: Snapshot, estimate: Estimate, model: ModelFacts) -> Decision:
    """A place for a model that is pinned warm, at any price for those that are not.

    It prefers an instance that gives the pinned context by default: there it serves requests that cannot name one.
    """
    request = _want(snapshot, model)
    pin = snapshot.policy.pins.get(model.name)
    if pin is not None and pin.context_length is not None:
        context = snapshot.engines[model.engine].requested_context(request.options)
        found = place(snapshot, estimate, replace(request, default_context=context))
        if context is None or not isinstance(found, NoFit):
            return found
    return place(snapshot, estimate, request)


def anticipate(
    snapshot: Snapshot,
    models: Mapping[BlobDigest, ModelFacts],
    dismissed: Set[BlobDigest],
    estimate: Estimate,
) -> Iterator[tuple[ModelFacts, Placed]]:
    """Yields one load that no ticket waits for: of a model that is pinned warm or requested often, into free room.

    One at a time, and none while another load is planned or under way, so that tickets go first. Models that clients
    unloaded (`dismissed`) are not loaded again until they are requested, unless they are pinned.
    """
    if snapshot.wanted or snapshot.reservations:
        return
    apart = overflow_instances(snapshot)
    loaded = {
        r.blob
        for r in snapshot.residencies.values()
        if r.instance not in apart and not is_drained(snapshot, r.instance)
    }
    for blob, model in models.items():
        if blob in loaded or not is_warm_wanted(snapshot, model):
            continue
        if blob in dismissed and not snapshot.policy.keeps_warm(model.name):
            continue
        found = place_warm(snapshot, estimate, model)
        if isinstance(found, Placed) and (not found.evict or snapshot.policy.keeps_warm(model.name)):
            yield model, found
            return
