"""What is loaded while nothing is asked: a large model whose load is longer than anybody wants to wait, if it is
requested often enough, in place of idle small models, which are loaded again within the time that their clients accept.

The cost of a model's absence is what its clients are expected to lose a second while it is not loaded: its rate of
requests times its load, and times the target for the first token in addition where the load alone is longer than that.
Such a load is *unasked*: nobody waits for it, and it gives way to any request that needs its room
(`scheduler/reconcile/unasked.py`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Rest
from router.domain.residency import ResidencyState
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import replicas_of
from router.scheduler.placement.cost import other_replicas, rate_of, reload_seconds
from router.scheduler.placement.placement import Placed, PlacementRequest, place

_FIRST_STEP_SECONDS = 1.0
"""From the end of a load to the first token, at least."""


def is_slow(snapshot: Snapshot, model: ModelFacts) -> bool:
    """Whether a request for the model, if it is not loaded, cannot have its first token within the target."""
    return reload_seconds(snapshot, model) + _FIRST_STEP_SECONDS > snapshot.policy.ttft_target_seconds


def absence_cost(snapshot: Snapshot, model: ModelFacts) -> float:
    """Seconds that clients are expected to lose per second while the model is not loaded."""
    late = snapshot.policy.ttft_target_seconds if is_slow(snapshot, model) else 0.0
    return rate_of(snapshot, model) * (reload_seconds(snapshot, model) + late)


def at_rest(
    snapshot: Snapshot, models: Mapping[BlobDigest, ModelFacts], dismissed: Set[BlobDigest], estimate: Estimate
) -> tuple[ModelFacts, Placed] | None:
    """The slow model to load now although nobody waits for it; None where it would not pay, or not yet.

    `models`: those that were requested. `dismissed`: those that clients have unloaded since.
    """
    rest = snapshot.policy.rest
    if rest is None or snapshot.wanted or snapshot.reservations:
        return None
    absent = [
        (absence_cost(snapshot, model), blob, model)
        for blob, model in models.items()
        if blob not in dismissed and not replicas_of(snapshot, blob) and is_slow(snapshot, model)
    ]
    if not absent:
        return None
    cost, _, model = max(absent, key=lambda entry: entry[:2])
    if snapshot.unasked_bytes_per_hour + model.weights_bytes > rest.bytes_per_hour:
        return None
    pin = snapshot.policy.pins.get(model.name)
    options = snapshot.engines[model.engine].default_options(model, pin, snapshot.policy.context_length)
    found = place(snapshot, estimate, PlacementRequest(model, options))
    if not isinstance(found, Placed) or not _gives_room(snapshot, found, cost, rest):
        return None
    return model, found


def _gives_room(snapshot: Snapshot, found: Placed, cost: float, rest: Rest) -> bool:
    """Whether those that would leave have been idle for a while, and are missed less."""
    missed = 0.0
    for key in found.evict:
        leaving = snapshot.residencies[key]
        if leaving.state is not ResidencyState.READY or leaving.in_flight:
            return False
        if snapshot.now - leaving.used_at < rest.pause_seconds:
            return False
        if not other_replicas(snapshot, leaving):
            missed += absence_cost(snapshot, leaving.model)
    return cost > rest.weight * missed
