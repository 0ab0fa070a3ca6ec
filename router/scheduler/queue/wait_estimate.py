"""Where each waiting ticket stands, and how long it will probably still wait for its slot.

The position counts those who wait for the same copies and will be served first: requests for another model take no slot
from these, they only compete for GPUs, and that shows in the wait. The wait is worked out by letting the tickets take
the slots one after another, in the order in which they are served:

- A busy slot has half its time to go on average: of n busy ones of a copy the first should be free after 1/(n+1) of the
  mean time that a slot is held, the next after 2/(n+1), and so on. Whoever takes it holds it for that mean time.
- A copy that is being loaded gives its slots when the load should end; one that is planned, a load after what stands in
  its room has left (busy ones: half the time that they hold a slot).
- Where no place is found yet, one is taken when the wait is worth its price, and at the latest when the tickets starve;
  where busy models are in the way, once these fall idle by themselves, and at the latest when they take no new requests
  any more and have ended the running ones.

It is an estimate: who comes later with a higher priority, who hangs up and further copies are not foreseen. That
clients who are served before this one now will be so again with their next requests is reckoned with. Nothing is said
(None) where nothing is known: no request of the model has ended yet, a load takes longer than it should, no server
runs. It decides nothing, and nothing is decided by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import exp

from router.domain.instance import InstanceState
from router.domain.model import BlobDigest
from router.domain.request import Ticket, TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.scheduler.balancing.replica_scorer import suits
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
    """How one ticket stands."""

    position: int
    """1: the next of those that wait for the same copies; 0: it has its slot."""
    expected_wait_seconds: float | None
    """From now until it has its slot; None where nothing can be said."""
    reason: str = ""
    """What it waits for, in words."""


@dataclass(frozen=True, slots=True)
class QueueLine:
    """Tickets that can share one copy, in the order in which they are served."""

    tickets: Sequence[Ticket]
    held: MustWait | None = None
    """Why those that no copy serves had no place when one was last sought."""


_OVERTAKEN_MAX = 0.75
"""Nobody is told more than four times what the tickets before it take: overtaking ends before a ticket is given up."""
_BUSY_MAX = 5.0
"""More requests at once than that are as good as always."""


class _Pool:
    """The slots of one copy, by when each is free next."""

    __slots__ = ("service_seconds", "times")

    def __init__(self, times: Iterable[float], service_seconds: float | None) -> None:
        self.times = list(times)
        self.service_seconds = service_seconds
        heapify(self.times)

    def take(self) -> float:
        """When the next slot is free; it is taken from then on, for ever where nobody knows for how long."""
        at = heappop(self.times)
        if self.service_seconds is not None:
            heappush(self.times, at + self.service_seconds)
        return at


def wait_estimates(
    snapshot: Snapshot, lines: Iterable[QueueLine], reasons: Mapping[TicketId, str]
) -> dict[TicketId, WaitEstimate]:
    """How each ticket stands, in the order of the lines, which is that in which they are served.

    `reasons`: what was found of some of them when they were last looked at.
    """
    pools: dict[ResidencyKey, _Pool] = {}
    passed: dict[BlobDigest, dict[tuple[_Pool, ...], int]] = {}
    found: dict[TicketId, WaitEstimate] = {}
    for line in lines:
        clients = {ticket.client for ticket in line.tickets}
        before_it: set[str] = set()
        for ticket, usable, words in _usable(snapshot, line, pools):
            before = passed.setdefault(ticket.model.blob, {})
            position = 1 + sum(count for others, count in before.items() if not set(usable).isdisjoint(others))
            before[usable] = before.get(usable, 0) + 1
            open_ones = [pool for pool in usable if pool.times]
            wait = min(open_ones, key=lambda pool: pool.times[0]).take() if open_ones else None
            if wait is not None:
                slots = sum(len(pool.times) for pool in open_ones)
                wait *= _longer_by_overtaking(snapshot, ticket, len(before_it - {ticket.client}) / len(clients), slots)
            before_it.add(ticket.client)
            found[ticket.id] = WaitEstimate(position, wait, reasons.get(ticket.id) or words)
    return found


def _usable(
    snapshot: Snapshot, line: QueueLine, pools: dict[ResidencyKey, _Pool]
) -> list[tuple[Ticket, tuple[_Pool, ...], str]]:
    """The tickets of a line, each with the copies that it can use (there, coming, or the one that has no place yet) and
    what it waits for."""
    replicas = {blob: coming(snapshot, blob) for blob in {ticket.model.blob for ticket in line.tickets}}
    used: list[tuple[Ticket, list[Residency]]] = [
        (ticket, [replica for replica in replicas[ticket.model.blob] if suits(snapshot, replica, ticket)])
        for ticket in line.tickets
    ]
    unserved = [ticket for ticket, suiting in used if not suiting]
    later = (_later(snapshot, unserved, line.held),) if unserved else ()
    words = line.held.reason if line.held is not None else ""
    return [
        (ticket, tuple(_pool(snapshot, replica, pools) for replica in suiting), describe_wait(suiting))
        if suiting
        else (ticket, later, words)
        for ticket, suiting in used
    ]


def _pool(snapshot: Snapshot, replica: Residency, pools: dict[ResidencyKey, _Pool]) -> _Pool:
    key = (replica.instance, replica.blob)
    if key not in pools:
        pools[key] = _Pool(_slot_times(snapshot, replica), shown_service_seconds(snapshot, replica.blob))
    return pools[key]


def _slot_times(snapshot: Snapshot, replica: Residency) -> list[float]:
    """When each slot of the copy is free, as far as that is known."""
    if replica.state is not ResidencyState.READY:
        at = _loaded_in(snapshot, replica)
        return [] if at is None else [at] * replica.slots
    held, busy = shown_service_seconds(snapshot, replica.blob), replica.in_flight
    left = [] if held is None else [held * number / (busy + 1) for number in range(1, busy + 1)]
    return [0.0] * max(0, replica.slots - busy) + left


def _loaded_in(snapshot: Snapshot, replica: Residency) -> float | None:
    """Seconds until a copy that is planned or being loaded should be there; None where that is overdue or unknown."""
    reservation = None if replica.load_id is None else snapshot.reservations.get(replica.load_id)
    if reservation is None:
        return None
    load = reload_seconds(snapshot, replica.model)
    if reservation.sent_at is not None:
        left = reservation.sent_at + load - snapshot.now
        return left if left > 0.0 else None
    leaving = _leaving_seconds(snapshot, reservation.evict)
    return None if leaving is None else leaving + load


def _leaving_seconds(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float | None:
    """Until the last of these is idle, if each request has half its time to go; None where that is unknown."""
    seconds = 0.0
    for key in keys:
        replica = snapshot.residencies.get(key)
        if replica is None or replica.state is not ResidencyState.READY or not replica.in_flight:
            continue
        held = shown_service_seconds(snapshot, replica.blob)
        if held is None:
            return None
        seconds = max(seconds, held / 2)
    return seconds


def _longer_by_overtaking(snapshot: Snapshot, ticket: Ticket, share: float, slots: int) -> float:
    """By how much longer a ticket waits because others come later and are served before it. `share`: of the clients
    those that go before it now, and will again with their next requests; `slots`: that it waits for.

    While it waits w, the slots are taken for w x share x load by those, and w is longer by that.
    """
    held = shown_service_seconds(snapshot, ticket.model.blob)
    if held is None or not share or not slots:
        return 1.0
    load = rate_of(snapshot, ticket.model) * held / slots
    return 1.0 / (1.0 - min(_OVERTAKEN_MAX, share * load))


def _longer_by_others(snapshot: Snapshot, keys: Iterable[ResidencyKey]) -> float:
    """By how much later copies that still take requests fall idle: each that comes meanwhile holds a slot as well. As
    the busy time of a queue with enough slots, which is exp(arrivals x time held) times longer (M/G/infinity)."""
    shares = [
        rate_of(snapshot, replica.model) * (shown_service_seconds(snapshot, replica.blob) or 0.0)
        for replica in (snapshot.residencies.get(key) for key in keys)
        if replica is not None and replica.in_flight
    ]
    return exp(min(_BUSY_MAX, max(shares, default=0.0)))


def _later(snapshot: Snapshot, tickets: Sequence[Ticket], held: MustWait | None) -> _Pool:
    """The copy that tickets without one will get; without slots where it cannot be said when."""
    model = tickets[0].model
    specs = [view.spec for view in snapshot.instances.values() if view.state is InstanceState.READY]
    engine = snapshot.engines[model.engine]
    slots = min((engine.slots(model, spec) for spec in specs if model.is_on(spec)), default=0)
    at = _place_in(snapshot, tickets, held) if slots and held is not None else None
    times = [] if at is None else [at + reload_seconds(snapshot, model)] * slots
    return _Pool(times, shown_service_seconds(snapshot, model.blob))


def _place_in(snapshot: Snapshot, tickets: Sequence[Ticket], held: MustWait) -> float | None:
    """Seconds until there is a place for these and what stands in it has left."""
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
        return None  # what it costs others counts no more, and still there is none: something else is in the way
    if held.price is None:
        return starving
    gained = snapshot.policy.constants.wait_weight * len(tickets)
    lacking = held.price - worth_of_load(snapshot, tickets[0].model, tickets)
    return max(0.0, min(starving, lacking / gained)) if gained > 0.0 else starving
