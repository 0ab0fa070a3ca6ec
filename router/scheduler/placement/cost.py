"""The value of a load and the price of an eviction, both in seconds of waiting.

A late first token costs `ttft_target_seconds`. The price of an eviction is that, times the requests expected for the
model until it is loaded again. The value of a load is that for each ticket it can still serve in time, plus a share of
each ticket's waiting time, so that every ticket is served in the end. A swap is made when its value reaches its price:
one new request does not evict a model in constant use; several requests, or one that has waited long, do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Ticket
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import memoise, replicas_of
from router.scheduler.placement.demand import rate_per_second

_SPARE_REPLICA = 0.1
"""Factor on the price of a replica when another one is loaded."""
_DEFAULT_SERVICE_SECONDS = 5.0
"""Used until the first request of a model has ended."""
_WORTH_A_LOAD_PER_SECOND = 1 / 240
"""Requests per second from which on a model is loaded into free room without a waiting ticket."""


def reload_seconds(snapshot: Snapshot, model: ModelFacts) -> float:
    """Seconds from the decision to the first free slot, including the time to clear the GPU."""
    policy = snapshot.policy
    rate = snapshot.load_rate_bytes_per_second or policy.constants.load_bytes_per_second
    return snapshot.engines[model.engine].reload_seconds(model, policy.constants.load_fixed_seconds, rate)


def rate_of(snapshot: Snapshot, model: ModelFacts) -> float:
    """Recent requests per second for the model."""
    return rate_per_second(
        snapshot.demand.get(model.blob), snapshot.now, snapshot.policy.constants.demand_half_life_seconds
    )


def is_warm_wanted(snapshot: Snapshot, model: ModelFacts) -> bool:
    """Returns True for a model that is pinned warm, or requested often enough to be worth a load into free room."""
    return snapshot.policy.keeps_warm(model.name) or rate_of(snapshot, model) >= _WORTH_A_LOAD_PER_SECOND


def eviction_price(snapshot: Snapshot, residency: Residency) -> float:
    """Seconds that clients are expected to lose if this replica is unloaded."""
    key = (eviction_price, residency.instance, residency.blob)
    return memoise(snapshot, key, lambda: _eviction_price(snapshot, residency))


def _eviction_price(snapshot: Snapshot, residency: Residency) -> float:
    policy = snapshot.policy
    model = residency.model
    away_seconds = policy.constants.away_seconds + reload_seconds(snapshot, model)
    price = rate_of(snapshot, model) * away_seconds * policy.ttft_target_seconds
    waiting = snapshot.wanted.get(residency.blob, 0)
    price += waiting * policy.ttft_target_seconds
    if other_replicas(snapshot, residency):
        price *= _SPARE_REPLICA
    return price


def worth_of_load(snapshot: Snapshot, model: ModelFacts, tickets: Iterable[Ticket]) -> float:
    """Queueing seconds that a load for these tickets saves."""
    policy = snapshot.policy
    load_seconds = reload_seconds(snapshot, model)
    served = tuple(tickets)
    late_share = policy.constants.late_share * (swap_ease(snapshot) - 1.0)
    if late_share < policy.constants.late_share_idle and _is_otherwise_idle(snapshot, len(served)):
        late_share = policy.constants.late_share_idle
    late_value = late_share * policy.ttft_target_seconds
    value = 0.0
    for ticket in served:
        waited = snapshot.now - ticket.arrived_at
        value += policy.constants.wait_weight * max(0.0, waited - policy.constants.hold_seconds)
        if waited + load_seconds <= policy.ttft_target_seconds:
            value += policy.ttft_target_seconds
        else:
            value += late_value
    return value


def _is_otherwise_idle(snapshot: Snapshot, tickets: int) -> bool:
    """Returns True if nothing runs and no tickets wait except this number: delaying these would help no other."""
    if sum(snapshot.wanted.values()) > tickets:
        return False
    return memoise(snapshot, _is_otherwise_idle, lambda: not any(r.in_flight for r in snapshot.residencies.values()))


def swap_price(snapshot: Snapshot, model: ModelFacts, leaving: Iterable[Residency]) -> float:
    """Seconds that clients are expected to lose within the half-life of demand if these leave for the model, each comes
    back in turn, and the model then has to leave for it.
    """
    horizon = snapshot.policy.constants.demand_half_life_seconds
    rate, reload = rate_of(snapshot, model), reload_seconds(snapshot, model)
    return sum(
        horizon * min(rate, rate_of(snapshot, r.model)) * (reload + reload_seconds(snapshot, r.model))
        for r in leaving
        if r.blob != model.blob and not other_replicas(snapshot, r)
    )


def fewer_slots_price(snapshot: Snapshot, model: ModelFacts, slots: int, fewer: int) -> float:
    """Seconds that the model's clients are expected to wait longer for a slot within the half-life of demand, those
    who wait now included, if it gets `fewer` instead of `slots`; infinite where that could not keep up."""
    held = shown_service_seconds(snapshot, model.blob) or _DEFAULT_SERVICE_SECONDS
    rate, waiting = rate_of(snapshot, model), snapshot.wanted.get(model.blob, 0)
    later = snapshot.policy.constants.demand_half_life_seconds * rate

    def seconds(number: int) -> float:
        return later * _queueing_seconds(rate, held, number) + held * sum(k // number for k in range(waiting))

    less = seconds(fewer)
    return less - seconds(slots) if less < float("inf") else less


def _queueing_seconds(rate: float, held: float, slots: int) -> float:
    """Mean wait for one of the slots (Sakasegawa's approximation of M/M/n, 1977)."""
    load = rate * held / slots
    if load >= 1.0:
        return float("inf")
    return held * load ** (math.sqrt(2.0 * (slots + 1)) - 1.0) / (slots * (1.0 - load))


class WaitBounds(NamedTuple):
    """Waiting times after which a ticket may cost other models more."""

    drain_after_seconds: float
    """From here on, busy models may be stopped from taking new requests."""
    starving_after_seconds: float
    """From here on, it gets its place at any price."""


def wait_bounds(snapshot: Snapshot, model: ModelFacts) -> WaitBounds:
    """The policy's bounds; shorter for a model whose weights alone exceed the largest GPU."""
    policy = snapshot.policy
    largest = max((gpu.memory_total_bytes for gpu in snapshot.gpus.values()), default=0)
    share = policy.constants.large_wait_share if 0 < largest < model.weights_bytes else 1.0
    return WaitBounds(policy.constants.drain_after_seconds * share, policy.starving_after_seconds * share)


def swap_ease(snapshot: Snapshot) -> float:
    """Budget of swaps divided by recent loads, from 1 (budget used up) to `swap_ease_max`.

    While loads are rare, tickets that are late anyway are served at once. While loads are frequent they have to wait,
    or the GPUs would spend all their time on loading.
    """
    policy = snapshot.policy
    ease = policy.constants.swap_budget_bytes_per_second / max(1.0, snapshot.loaded_bytes_per_second)
    return max(1.0, min(policy.constants.swap_ease_max, ease))


def shown_service_seconds(snapshot: Snapshot, blob: BlobDigest) -> float | None:
    """Mean seconds that a request holds a slot of the model; None until the first one has ended."""
    demand = snapshot.demand.get(blob)
    return None if demand is None else demand.service_seconds


def service_seconds(snapshot: Snapshot, residency: Residency) -> float:
    """Mean seconds that a request holds a slot of the model; a default until the first one has ended."""
    measured = shown_service_seconds(snapshot, residency.blob)
    return _DEFAULT_SERVICE_SECONDS if measured is None else measured


def other_replicas(snapshot: Snapshot, residency: Residency) -> list[Residency]:
    """Loaded replicas of the same weights on other instances."""
    return [
        r
        for r in replicas_of(snapshot, residency.blob)
        if r.instance != residency.instance and r.state is ResidencyState.READY
    ]
