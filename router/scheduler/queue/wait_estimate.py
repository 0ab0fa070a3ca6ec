"""Estimates the queue position of each waiting ticket, and how long it will still wait for a slot.

The position counts the tickets that wait for the same replicas and will be served first. Requests for other models use
no slots of these; they only compete for GPUs, which is part of the wait. The wait is computed by letting the tickets
take the slots one after another, in serving order:

- Of n busy slots of a replica, the first should be free after 1/(n+1) of the mean service time, the second after
  2/(n+1), and so on. The next ticket holds its slot for the mean service time.
- The slots of a loading replica are free at the expected end of the load. Those of a planned one are free one load
  after the models in its room are unloaded (busy models: after half a service time).
- If no place was found yet, one is found when the tickets are worth its price, at the latest when they starve. If busy
  models are in the way, a place is found when these become idle by themselves, at the latest when they are drained.

The estimate includes that clients served before this ticket will send further requests. It does not include later
requests of higher priority, cancelled requests, and further replicas. The wait is None if it is unknown: no request of
the model has ended yet, a load is overdue, or no server runs. Decisions do not depend on these estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import exp

from router.domain.instance import InstanceState
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Ticket, TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.scheduler.balancing.replica_choice import suits
from router.scheduler.placement.cost import (
    rate_of,
    reload_seconds,
    shown_service_seconds,
    wait_bounds,
    worth_of_load,
)
from router.scheduler.placement.placement import MustWait
from router.scheduler.placement.search import coming
from router.scheduler.reconcile.residency import describe_wait


@dataclass(frozen=True, slots=True)
class WaitEstimate:
    """Position and expected wait of one ticket."""

    position: int
    """1: the next of those that wait for the same replicas; 0: it has its slot."""
    expected_wait_seconds: float | None
    """From now until it has its slot; None if unknown."""
    reason: str = ""
    """What it waits for, as text for users."""


@dataclass(frozen=True, slots=True)
class QueueLine:
    """Tickets that can share one replica, in serving order."""

    tickets: Sequence[Ticket]
    held: MustWait | None = None
    """Result of the last failed search, for the tickets that no replica serves."""


_OVERTAKEN_MAX = 0.75
"""Limits the estimate to four times the wait without overtaking, because overtaking ends before a ticket's deadline."""
_BUSY_MAX = 5.0
"""With more concurrent requests than this, a model counts as always busy."""


class _Pool:
    """The slots of one replica, by the time at which each is free next."""

    __slots__ = ("service_seconds", "times")

    def __init__(self, times: Iterable[float], service_seconds: float | None) -> None:
        self.times = list(times)
        self.service_seconds = service_seconds
        heapify(self.times)

    def take(self) -> float:
        """When the next slot is free. It is then taken for the service time, or for ever if that is unknown."""
        at = heappop(self.times)
        if self.service_seconds is not None:
            heappush(self.times, at + self.service_seconds)
        return at


def wait_estimates(
    snapshot: Snapshot, lines: Iterable[QueueLine], reasons: Mapping[TicketId, str]
) -> dict[TicketId, WaitEstimate]:
    """Estimates for all tickets. The lines, and the tickets in each, are in serving order.

    `reasons`: known reasons of some tickets, which replace the computed ones.
    """
    pools: dict[ResidencyKey, _Pool] = {}
    counted: dict[BlobDigest, dict[tuple[_Pool, ...], int]] = {}
    estimates: dict[TicketId, WaitEstimate] = {}
    for line in lines:
        clients = {ticket.client for ticket in line.tickets}
        clients_ahead: set[str] = set()
        for ticket, usable, reason in _usable(snapshot, line, pools):
            ahead = counted.setdefault(ticket.model.blob, {})
            position = 1 + sum(count for others, count in ahead.items() if not set(usable).isdisjoint(others))
            ahead[usable] = ahead.get(usable, 0) + 1
            open_pools = [pool for pool in usable if pool.times]
            wait = min(open_pools, key=lambda pool: pool.times[0]).take() if open_pools else None
            if wait is not None:
                slots = sum(len(pool.times) for pool in open_pools)
                share = len(clients_ahead - {ticket.client}) / len(clients)
                wait *= _longer_by_overtaking(snapshot, ticket, share, slots)
            clients_ahead.add(ticket.client)
            estimates[ticket.id] = WaitEstimate(position, wait, reasons.get(ticket.id) or reason)
    return estimates


def _usable(
    snapshot: Snapshot, line: QueueLine, pools: dict[ResidencyKey, _Pool]
) -> list[tuple[Ticket, tuple[_Pool, ...], str]]:
    """The tickets of a line, each with usable replicas (loaded, loading, planned or not yet placed) and a reason."""
    replicas = {blob: coming(snapshot, blob) for blob in {ticket.model.blob for ticket in line.tickets}}
    matches: list[tuple[Ticket, list[Residency]]] = [
        (ticket, [replica for replica in replicas[ticket.model.blob] if suits(snapshot, replica, ticket)])
        for ticket in line.tickets
    ]
    unserved = [ticket for ticket, suitable in matches if not suitable]
    unplaced = (_unplaced(snapshot, unserved, line.held),) if unserved else ()
    reason = line.held.reason if line.held is not None else ""
    return [
        (ticket, tuple(_pool(snapshot, replica, pools) for replica in suitable), describe_wait(suitable))
        if suitable
        else (ticket, unplaced, reason)
        for ticket, suitable in matches
    ]


def _pool(snapshot: Snapshot, replica: Residency, pools: dict[ResidencyKey, _Pool]) -> _Pool:
    key = (replica.instance, replica.blob)
    if key not in pools:
        pools[key] = _Pool(_slot_times(snapshot, replica), shown_service_seconds(snapshot, replica.blob))
    return pools[key]


def _slot_times(snapshot: Snapshot, replica: Residency) -> list[float]:
    """Seconds until each slot of the replica is free; slots for which this is unknown are left out."""
    if replica.state is not ResidencyState.READY:
        seconds = _loaded_in(snapshot, replica)
        return [] if seconds is None else [seconds] * replica.slots
    service, busy = shown_service_seconds(snapshot, replica.blob), replica.in_flight
    busy_slots = [] if service is None else [service * number / (busy + 1) for number in range(1, busy + 1)]
    return [0.0] * max(0, replica.slots - busy) + busy_slots


def _loaded_in(snapshot: Snapshot, replica: Residency) -> float | None:
    """Seconds until a planned or loading replica should be loaded; None if it is overdue or unknown."""
    reservation = None if replica.load_id is None else snapshot.reservations.get(replica.load_id)
    if reservation is None:
        return None
    load = reload_seconds(snapshot, replica.model)
    if reservation.sent_at is not None:
        remaining = reservation.sent_at + load - snapshot.now
        return remaining if remaining > 0.0 else None
    return load_seconds(snapshot, replica.model, reservation.evict)


def load_seconds(snapshot: Snapshot, model: ModelFacts, leaving: Iterable[ResidencyKey]) -> float | None:
    """Seconds until a load that is planned now has ended, `leaving` being unloaded first; None if unknown."""
    seconds = _leaving_seconds(snapshot, leaving)
    return None if seconds is None else seconds + reload_seconds(snapshot, model)


def _leaving_seconds(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float | None:
    """Seconds until the last of these is idle, if each request has half its service time left; None if unknown."""
    seconds = 0.0
    for key in keys:
        replica = snapshot.residencies.get(key)
        if replica is None or replica.state is not ResidencyState.READY or not replica.in_flight:
            continue
        service = shown_service_seconds(snapshot, replica.blob)
        if service is None:
            return None
        seconds = max(seconds, service / 2)
    return seconds


def _longer_by_overtaking(snapshot: Snapshot, ticket: Ticket, share: float, slots: int) -> float:
    """Factor on the wait of a ticket, because later requests will be served before it.

    `share`: the share of clients that are ahead of it now, and will be again with their next requests. `slots`: the
    number of slots that it waits for. During a wait w, these clients use the slots for w x share x load, which makes
    the wait longer.
    """
    service = shown_service_seconds(snapshot, ticket.model.blob)
    if service is None or not share or not slots:
        return 1.0
    load = rate_of(snapshot, ticket.model) * service / slots
    return 1.0 / (1.0 - min(_OVERTAKEN_MAX, share * load))


def _longer_by_others(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float:
    """Factor on the time until replicas become idle that still take new requests.

    It is that of the busy period of a queue with enough slots (M/G/infinity): exp(arrival rate x service time).
    """
    shares = [
        rate_of(snapshot, replica.model) * (shown_service_seconds(snapshot, replica.blob) or 0.0)
        for replica in (snapshot.residencies.get(key) for key in keys)
        if replica is not None and replica.in_flight
    ]
    return exp(min(_BUSY_MAX, max(shares, default=0.0)))


def _unplaced(snapshot: Snapshot, tickets: Sequence[Ticket], held: MustWait | None) -> _Pool:
    """The replica that tickets without one will get; without slots if the time is unknown."""
    model = tickets[0].model
    specs = [view.spec for view in snapshot.instances.values() if view.state is InstanceState.READY]
    engine = snapshot.engines[model.engine]
    slots = min((engine.slots(model, spec) for spec in specs if model.is_on(spec)), default=0)
    seconds = _place_in(snapshot, tickets, held) if slots and held is not None else None
    times = [] if seconds is None else [seconds + reload_seconds(snapshot, model)] * slots
    return _Pool(times, shown_service_seconds(snapshot, model.blob))


def _place_in(snapshot: Snapshot, tickets: Sequence[Ticket], held: MustWait) -> float | None:
    """Seconds until there is a place for these tickets and its models are unloaded; None if unknown."""
    waited = snapshot.now - min(ticket.arrived_at for ticket in tickets)
    bounds = wait_bounds(snapshot, tickets[0].model)
    starving = bounds.starving_after_seconds - waited
    if held.drain:
        leaving = _leaving_seconds(snapshot, held.drain)
        if leaving is None or snapshot.draining.intersection(held.drain):
            return leaving
        begins = max(0.0, bounds.drain_after_seconds - waited)
        return min(begins + leaving, leaving * _longer_by_others(snapshot, held.drain))
    if starving <= 0.0:
        return None  # the price no longer matters, so something else is in the way
    if held.price is None:
        return starving
    value_per_second = snapshot.policy.constants.wait_weight * len(tickets)
    missing_value = held.price - worth_of_load(snapshot, tickets[0].model, tickets)
    return max(0.0, min(starving, missing_value / value_per_second)) if value_per_second > 0.0 else starving
