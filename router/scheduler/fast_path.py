"""The dispatcher's fast path, for the two events of every request while nothing waits and nothing loads.

It returns the same actions and leaves the same state as the full path (`router/scheduler/dispatcher.py`), at a tenth of
the cost; a test plays random event sequences through both. It returns None to fall back to the full path. It reads
`FleetState.uses` directly instead of writing it into the residencies, which is the main cost of the full path.
"""

from __future__ import annotations

from router.domain.actions import Action
from router.domain.events import Arrived, Event, Released
from router.domain.request import Ticket
from router.domain.residency import ResidencyState
from router.scheduler.balancing.replica_choice import free_replicas, grant, serving
from router.scheduler.state import FleetState, expiry

_NEVER = float("inf")


def handle(fleet: FleetState, event: Event, now: float) -> list[Action] | None:
    """The actions of an event, or None to fall back to the full path.

    Called only while the queue is empty and there is no shutdown.
    """
    if fleet.reservations or fleet.draining or fleet.restarts_due or fleet.wake is None:
        return None
    wake = fleet.wake[0]
    if wake is not None and wake <= now:
        return None
    if isinstance(event, Arrived):
        actions = _arrive(fleet, event.ticket, now)
        if wake is not None:
            fleet.wake = None  # the replica that would expire next may be in use now
        return actions
    if not isinstance(event, Released) or event.runner_lost or event.silent_seconds or event.failure is not None:
        return None
    expires_at = _release(fleet, event, now)
    if expires_at is None:
        return None
    if expires_at < (_NEVER if wake is None else wake):
        fleet.wake = (expires_at,)
    return []


def _arrive(fleet: FleetState, ticket: Ticket, now: float) -> list[Action] | None:
    """Grants the ticket; None if no replica can serve it now."""
    free, replicas = free_replicas(fleet, ticket.model.blob)
    able = serving(fleet, free, ticket)
    if not able:
        return None
    fleet.record_request(ticket, now)
    return [grant(fleet, able, replicas, ticket, now)]


def _release(fleet: FleetState, event: Released, now: float) -> float | None:
    """Frees a slot. Returns when its replica expires, or `_NEVER`.

    Returns None, and does nothing, if the replica has to be unloaded at once.
    """
    lease = fleet.leases.get(event.ticket_id)
    replica = fleet.replicas.get(lease.key) if lease is not None else None
    if lease is None or replica is None or replica.loaded_at != lease.loaded_at:
        fleet.end_lease(event, now)
        return _NEVER
    if lease.key[0] in fleet.taken_out or lease.key[0] in fleet.overflow:
        return None
    if fleet.health and (lease.key in fleet.health or lease.key[0] in fleet.health):
        return None
    use = fleet.use_of(lease.key)
    expires_at = use.expires_at
    if use.in_flight == 1 and replica.state is ResidencyState.READY:
        expires_at = expiry(use.keep_alive_seconds, now)
    if expires_at is not None and expires_at <= now:
        return None
    fleet.end_lease(event, now)
    use.in_flight, use.used_at, use.expires_at = use.in_flight - 1, now, expires_at
    return _NEVER if expires_at is None else expires_at
