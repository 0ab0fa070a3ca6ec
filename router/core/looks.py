"""When a place was last sought in vain, for each group that waits, and so whose turn it is to look again.

A look costs much more than an event, and finds the same as long as nothing has changed: a group looks again when the
state has changed, and after a while because time alone lets drains begin and failures be forgotten. While nobody is due
the queue is calm, and an event that changes nothing but slots concerns none but those who wait for the same weights.
"""

from __future__ import annotations

from router.core.entities import BlobDigest
from router.core.events import Arrived, Event, Released
from router.core.placement import MustWait
from router.core.state import FleetState
from router.core.waitqueue import GroupKey, WaitQueue

AGAIN_SECONDS = 1.0
_NEVER = (-1, float("-inf"))


class Looks:
    """Mutable, the dispatcher's."""

    __slots__ = ("_calm", "_held", "_seen")

    def __init__(self) -> None:
        self._seen: dict[GroupKey, tuple[int, float]] = {}
        """State's version and time of the last look in vain."""
        self._held: dict[GroupKey, MustWait] = {}
        """What the last look in vain found, for groups that no copy serves."""
        self._calm = _NEVER
        """State's version at which all had looked, and when the first is due again."""

    def in_vain(self, key: GroupKey, version: int, now: float, found: MustWait | None = None) -> None:
        self._seen[key] = (version, now)
        if found is not None:
            self._held[key] = found

    def held(self, key: GroupKey) -> MustWait | None:
        """Why the group had no place when one was last sought; means nothing where a copy serves it by now."""
        return self._held.get(key)

    def is_due(self, key: GroupKey, version: int, now: float) -> bool:
        seen, at = self._seen.get(key, _NEVER)
        return seen != version or now - at >= AGAIN_SECONDS

    def forget_others(self, queue: WaitQueue) -> None:
        self._seen = {key: seen for key, seen in self._seen.items() if queue.has_group(key)}
        self._held = {key: held for key, held in self._held.items() if queue.has_group(key)}

    def all_looked(self, queue: WaitQueue, version: int) -> None:
        """The queue was gone through: it is calm from now on if all of it has looked at this version."""
        seen = [self._seen.get(key, _NEVER) for key in queue.unsorted()]
        is_calm = all(found[0] == version for found in seen)
        self._calm = (version, min((at for _, at in seen), default=float("inf"))) if is_calm else _NEVER

    def is_calm(self, fleet: FleetState, queue: WaitQueue, now: float) -> bool:
        """Whether the queue was gone through since anything changed, and time alone brings nothing yet."""
        if self._calm[0] != fleet.version or now - self._calm[1] >= AGAIN_SECONDS:
            return False
        if fleet.wake is None or (fleet.wake[0] is not None and fleet.wake[0] <= now):
            return False
        return all(queue.waits_for(plan.blob) for plan in fleet.reservations.values() if plan.sent_at is None)


def concerned(fleet: FleetState, event: Event) -> BlobDigest | None:
    """The only weights whose tickets an event lets go on that changes nothing but slots; None for any other event."""
    if isinstance(event, Arrived):
        return event.ticket.model.blob
    lease = fleet.leases.get(event.ticket_id) if isinstance(event, Released) else None
    return None if lease is None else lease.key[1]
