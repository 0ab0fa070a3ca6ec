"""Decides when a waiting group searches for a place again after a search that found none.

A search costs much more than an event, and has the same result as long as nothing has changed. So a group searches
again when the state has changed, and after a while, because drains begin and failures are dropped by time alone. While
no group is due the queue is *quiescent*: an event that only changes slots then concerns only the tickets that wait for
the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from router.domain.events import Arrived, Event, Released, ResidencyRead
from router.domain.model import BlobDigest
from router.domain.request import Ticket
from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.scheduler.placement.cost import is_warm_wanted, wait_bounds
from router.scheduler.placement.placement import MustWait
from router.scheduler.queue.wait_queue import GroupKey, WaitQueue
from router.scheduler.state import FleetState

RETRY_SECONDS = 1.0
_NEVER = (-1, float("-inf"))


class RetryGate:
    """Mutable, owned by the dispatcher. `version` is that of the state (`FleetState.version`)."""

    __slots__ = ("_attempts", "_held", "_quiescent")

    def __init__(self) -> None:
        self._attempts: dict[GroupKey, tuple[int, float]] = {}
        """Version at the last failed search, and when the next one is due even if nothing changes."""
        self._held: dict[GroupKey, MustWait] = {}
        """Result of the last failed search, for groups that no replica serves."""
        self._quiescent = _NEVER
        """Version at which all groups had searched, and when the first of them is due again."""

    def failed(self, key: GroupKey, version: int, until: float, found: MustWait | None = None) -> None:
        """The group found no place; it searches again at `until`, or when the version changes."""
        self._attempts[key] = (version, until)
        if found is not None:
            self._held[key] = found

    def held(self, key: GroupKey) -> MustWait | None:
        """Why the last search found no place; outdated if a replica serves the group now."""
        return self._held.get(key)

    def is_due(self, key: GroupKey, version: int, now: float) -> bool:
        """Returns True if the group has to search again."""
        attempted_version, until = self._attempts.get(key, _NEVER)
        return attempted_version != version or until <= now

    def forget_others(self, queue: WaitQueue) -> None:
        """Drops groups that no longer wait."""
        self._attempts = {key: attempt for key, attempt in self._attempts.items() if queue.has_group(key)}
        self._held = {key: held for key, held in self._held.items() if queue.has_group(key)}

    def all_attempted(self, keys: Iterable[GroupKey], version: int) -> None:
        """The whole queue was handled: it is quiescent if all groups have searched at this version."""
        self._quiescent = (version, float("inf"))
        self.attempted(keys, version)

    def attempted(self, keys: Iterable[GroupKey], version: int) -> None:
        """These groups of a quiescent queue were handled."""
        attempts = [self._attempts.get(key, _NEVER) for key in keys]
        is_quiescent = self._quiescent[0] == version and all(attempt[0] == version for attempt in attempts)
        self._quiescent = (
            (version, min([self._quiescent[1], *(until for _, until in attempts)])) if is_quiescent else _NEVER
        )

    def ignore_change(self, before: int, version: int) -> None:
        """The change from version `before` to `version` does not concern any waiting ticket."""
        self._attempts = {
            key: (version if attempted_version == before else attempted_version, until)
            for key, (attempted_version, until) in self._attempts.items()
        }
        self._quiescent = (version, self._quiescent[1]) if self._quiescent[0] == before else self._quiescent

    def is_quiescent(self, fleet: FleetState, queue: WaitQueue, now: float) -> bool:
        """Returns True if the queue was handled since the last change, and nothing is due by time yet."""
        if self._quiescent[0] != fleet.version or self._quiescent[1] <= now:
            return False
        if fleet.wake is None or (fleet.wake[0] is not None and fleet.wake[0] <= now):
            return False
        unwanted = [plan for plan in fleet.plans() if not queue.waits_for(plan.blob)]
        return not unwanted or _are_kept(fleet, unwanted, now)


def _are_kept(fleet: FleetState, plans: Iterable[Reservation], now: float) -> bool:
    """Returns True if these plans are kept although no ticket waits for them."""
    snapshot = fleet.snapshot(now)
    planned = [snapshot.residencies.get((plan.instance, plan.blob)) for plan in plans]
    return all(residency is not None and is_warm_wanted(snapshot, residency.model) for residency in planned)


def next_attempt(snapshot: Snapshot, tickets: Sequence[Ticket]) -> float:
    """When these tickets search again after a failed search, if nothing changes.

    After `RETRY_SECONDS`, or earlier when they have waited long enough to be allowed more.
    """
    now = snapshot.now
    since = min(ticket.arrived_at for ticket in tickets)
    steps = (*wait_bounds(snapshot, tickets[0].model), snapshot.policy.ttft_target_seconds)
    return min([now + RETRY_SECONDS, *(since + step for step in steps if since + step > now)])


def concerned(fleet: FleetState, event: Event) -> Collection[BlobDigest] | None:
    """The weights whose tickets an event can help, if it only changes slots; None if it may help any ticket."""
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
