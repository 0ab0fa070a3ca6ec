"""When a place was last sought in vain, for each group that waits, and so whose turn it is to look again.

A look costs much more than an event, and finds the same as long as nothing has changed: a group looks again when the
state has changed, and after a while because time alone lets drains begin and failures be forgotten. While nobody is due
the queue is calm, and an event that changes nothing but slots concerns none but those who wait for the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from router.domain.events import Arrived, Event, Released, ResidencyRead
from router.domain.model import BlobDigest
from router.domain.request import Ticket
from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.scheduler.placement.cost import wait_bounds
from router.scheduler.placement.placement import MustWait
from router.scheduler.queue.wait_queue import GroupKey, WaitQueue
from router.scheduler.reconcile.housekeeping import is_warm_wanted
from router.scheduler.state import FleetState

RETRY_SECONDS = 1.0
_NEVER = (-1, float("-inf"))


class RetryGate:
    """Mutable, the dispatcher's."""

    __slots__ = ("_held", "_quiescent", "_seen")

    def __init__(self) -> None:
        self._seen: dict[GroupKey, tuple[int, float]] = {}
        """State's version of the last look in vain, and when the next is due whatever happens."""
        self._held: dict[GroupKey, MustWait] = {}
        """What the last look in vain found, for groups that no copy serves."""
        self._quiescent = _NEVER
        """State's version at which all had looked, and when the first is due again."""

    def failed(self, key: GroupKey, version: int, until: float, found: MustWait | None = None) -> None:
        self._seen[key] = (version, until)
        if found is not None:
            self._held[key] = found

    def held(self, key: GroupKey) -> MustWait | None:
        """Why the group had no place when one was last sought; means nothing where a copy serves it by now."""
        return self._held.get(key)

    def is_due(self, key: GroupKey, version: int, now: float) -> bool:
        seen, until = self._seen.get(key, _NEVER)
        return seen != version or until <= now

    def forget_others(self, queue: WaitQueue) -> None:
        self._seen = {key: seen for key, seen in self._seen.items() if queue.has_group(key)}
        self._held = {key: held for key, held in self._held.items() if queue.has_group(key)}

    def all_attempted(self, keys: Iterable[GroupKey], version: int) -> None:
        """The whole queue was gone through: it is calm from now on if all of it has looked at this version."""
        self._quiescent = (version, float("inf"))
        self.attempted(keys, version)

    def attempted(self, keys: Iterable[GroupKey], version: int) -> None:
        """These of a calm queue were gone through."""
        seen = [self._seen.get(key, _NEVER) for key in keys]
        is_quiescent = self._quiescent[0] == version and all(found[0] == version for found in seen)
        self._quiescent = (
            (version, min([self._quiescent[1], *(until for _, until in seen)])) if is_quiescent else _NEVER
        )

    def still(self, before: int, version: int) -> None:
        """What changed in between concerns nobody who waits."""
        self._seen = {key: (version if seen == before else seen, until) for key, (seen, until) in self._seen.items()}
        self._quiescent = (version, self._quiescent[1]) if self._quiescent[0] == before else self._quiescent

    def is_quiescent(self, fleet: FleetState, queue: WaitQueue, now: float) -> bool:
        """Whether the queue was gone through since anything changed, and time alone brings nothing yet."""
        if self._quiescent[0] != fleet.version or self._quiescent[1] <= now:
            return False
        if fleet.wake is None or (fleet.wake[0] is not None and fleet.wake[0] <= now):
            return False
        unwanted = [p for p in fleet.reservations.values() if p.sent_at is None and not queue.waits_for(p.blob)]
        return not unwanted or _stand(fleet, unwanted, now)


def _stand(fleet: FleetState, plans: Iterable[Reservation], now: float) -> bool:
    """Whether these are kept although nobody waits for them."""
    facts = fleet.snapshot(now)
    found = [facts.residencies.get((plan.instance, plan.blob)) for plan in plans]
    return all(one is not None and is_warm_wanted(facts, one.model) for one in found)


def next_attempt(snapshot: Snapshot, tickets: Sequence[Ticket]) -> float:
    """When those who have just looked in vain look again though nothing has changed: soon, and as soon as they have
    waited so long that more is allowed for their sake."""
    now = snapshot.now
    since = min(ticket.arrived_at for ticket in tickets)
    steps = (*wait_bounds(snapshot, tickets[0].model), snapshot.policy.ttft_target_seconds)
    return min([now + RETRY_SECONDS, *(since + step for step in steps if since + step > now)])


def concerned(fleet: FleetState, event: Event) -> Collection[BlobDigest] | None:
    """The only weights whose tickets an event lets go on where it changes nothing but slots; None: perhaps any."""
    match event:
        case Arrived():
            return (event.ticket.model.blob,)
        case Released():
            lease = fleet.leases.get(event.ticket_id)
            return () if lease is None else (lease.key[1],)
        case ResidencyRead():
            return ()
        case _:
            return None
