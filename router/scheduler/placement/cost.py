"""What it is worth to bring a model in, and what it costs to let one go: both in seconds that clients wait in vain.

A first token that comes too late is worth `ttft_target_seconds`. An eviction costs as many of those as requests are
expected for the model while it is away; a load is worth one for each ticket that it can still serve in time, and for
every ticket a share of the time that it has waited, so that whatever waits comes to its turn in the end. A swap is
made when it is worth its price: a model that is asked for in vain once does not drive out one that is asked for all
the time, but several, or one for long, do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Ticket
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import memoise, replicas_of
from router.scheduler.placement.demand import rate_per_second

_SPARE_REPLICA = 0.1
_GUESSED_SERVICE_SECONDS = 5.0


def reload_seconds(snapshot: Snapshot, model: ModelFacts) -> float:
    """From the decision to the first slot, on a GPU that has to be cleared first."""
    policy = snapshot.policy
    rate = snapshot.load_rate_bytes_per_second or policy.constants.load_bytes_per_second
    return snapshot.engines[model.engine].reload_seconds(model, policy.constants.load_fixed_seconds, rate)


def rate_of(snapshot: Snapshot, model: ModelFacts) -> float:
    """Requests a second for the model, of late."""
    return rate_per_second(
        snapshot.demand.get(model.blob), snapshot.now, snapshot.policy.constants.demand_half_life_seconds
    )


def eviction_price(snapshot: Snapshot, residency: Residency) -> float:
    """Seconds that clients are expected to lose by unloading this copy."""
    key = (eviction_price, residency.instance, residency.blob)
    return memoise(snapshot, key, lambda: _eviction_price(snapshot, residency))


def _eviction_price(snapshot: Snapshot, residency: Residency) -> float:
    policy = snapshot.policy
    model = residency.model
    away = policy.constants.away_seconds + reload_seconds(snapshot, model)
    price = rate_of(snapshot, model) * away * policy.ttft_target_seconds
    waiting = snapshot.wanted.get(residency.blob, 0)
    price += waiting * policy.ttft_target_seconds
    if other_replicas(snapshot, residency):
        price *= _SPARE_REPLICA
    return price


def worth_of_load(snapshot: Snapshot, model: ModelFacts, tickets: Iterable[Ticket]) -> float:
    """Seconds of waiting in vain that a load for these tickets saves."""
    policy = snapshot.policy
    lead = reload_seconds(snapshot, model)
    asking = tuple(tickets)
    share = policy.constants.late_share * (swap_ease(snapshot) - 1.0)
    if share < policy.constants.late_share_idle and _is_idle_beside(snapshot, len(asking)):
        share = policy.constants.late_share_idle
    late = share * policy.ttft_target_seconds
    worth = 0.0
    for ticket in asking:
        waited = snapshot.now - ticket.arrived_at
        worth += policy.constants.wait_weight * max(0.0, waited - policy.constants.hold_seconds)
        if waited + lead <= policy.ttft_target_seconds:
            worth += policy.ttft_target_seconds
        else:
            worth += late
    return worth


def _is_idle_beside(snapshot: Snapshot, tickets: int) -> bool:
    """Whether nothing runs, and nobody waits beside so many: to hold these back would serve nobody now."""
    if sum(snapshot.wanted.values()) > tickets:
        return False
    return memoise(snapshot, _is_idle_beside, lambda: not any(r.in_flight for r in snapshot.residencies.values()))


class WaitBounds(NamedTuple):
    """How long a ticket waits at most until more is done for its sake."""

    drain_after_seconds: float
    """Busy models may be stopped from taking new requests."""
    starving_after_seconds: float
    """It gets its place whatever that costs others."""


def wait_bounds(snapshot: Snapshot, model: ModelFacts) -> WaitBounds:
    """The policy's, and less than that for a model whose weights alone are more than the largest GPU."""
    policy = snapshot.policy
    largest = max((gpu.memory_total_bytes for gpu in snapshot.gpus.values()), default=0)
    share = policy.constants.large_wait_share if 0 < largest < model.weights_bytes else 1.0
    return WaitBounds(policy.constants.drain_after_seconds * share, policy.starving_after_seconds * share)


def swap_ease(snapshot: Snapshot) -> float:
    """How far the loads of late stay below the budget of swaps: 1 where it is used up, more while few are made.

    While loads are few, who is late anyway is served at once; while they are many that has to wait, or all GPUs would
    spend their time on loading.
    """
    policy = snapshot.policy
    ease = policy.constants.swap_budget_bytes_per_second / max(1.0, snapshot.loaded_bytes_per_second)
    return max(1.0, min(policy.constants.swap_ease_max, ease))


def shown_service_seconds(snapshot: Snapshot, blob: BlobDigest) -> float | None:
    """How long a request holds a slot of the model, as far as any has shown."""
    demand = snapshot.demand.get(blob)
    return None if demand is None else demand.service_seconds


def service_seconds(snapshot: Snapshot, residency: Residency) -> float:
    """How long a request holds a slot of the model; a guess where none has ended yet."""
    known = shown_service_seconds(snapshot, residency.blob)
    return _GUESSED_SERVICE_SECONDS if known is None else known


def other_replicas(snapshot: Snapshot, residency: Residency) -> list[Residency]:
    """Loaded copies of the same weights on other instances."""
    return [
        r
        for r in replicas_of(snapshot, residency.blob)
        if r.instance != residency.instance and r.state is ResidencyState.READY
    ]
