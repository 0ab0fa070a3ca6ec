"""The short way of the dispatcher, for the two events that every request brings while nothing waits and nothing loads.

It gives the very actions and leaves the very state of the long way (`router/core/dispatcher.py`), at a tenth of the
cost; a test plays random lives through both. Whatever it is not sure to do alike it leaves to the long way, by giving
None. It reads the copies without writing their use into them first, which is what the long way would spend its time on.
"""

from __future__ import annotations

from router.core.balance import can_take, rank
from router.core.entities import BlobDigest, Residency, ResidencyKey, ResidencyState, Ticket
from router.core.events import Action, Arrived, Event, Grant, Released
from router.core.state import FleetState, expiry

_NEVER = float("inf")
FreeCopy = tuple[ResidencyKey, Residency, int, float]
"""A copy with how many of its slots are in use, and when it was used last."""


def handle(fleet: FleetState, event: Event, now: float) -> list[Action] | None:
    """What the event brings, where the queue is empty and nobody shuts down; None where the long way must be gone."""
    if fleet.reservations or fleet.draining or fleet.wake is None:
        return None
    wake = fleet.wake[0]
    if wake is not None and wake <= now:
        return None
    if isinstance(event, Arrived):
        actions = _arrive(fleet, event.ticket, now)
        if wake is not None:
            fleet.wake = None  # what would have left may stay now
        return actions
    if not isinstance(event, Released) or event.runner_lost:
        return None
    leaves = _release(fleet, event, now)
    if leaves is None:
        return None
    if leaves < (_NEVER if wake is None else wake):
        fleet.wake = (leaves,)
    return []


def _arrive(fleet: FleetState, ticket: Ticket, now: float) -> list[Action] | None:
    """Grants the ticket at once; None where no copy can take it."""
    key = serving(fleet, free_copies(fleet, ticket.model.blob), ticket)
    if key is None:
        return None
    fleet.asked(ticket, now)
    return [grant(fleet, ticket, key, now)]


def free_copies(fleet: FleetState, blob: BlobDigest) -> list[FreeCopy]:
    """Copies of these weights that have a slot left."""
    found: list[FreeCopy] = []
    for key, copy in fleet.copies.items():
        if copy.blob == blob:
            use = fleet.uses.get(key) or copy
            if use.in_flight < copy.slots:
                found.append((key, copy, use.in_flight, use.used_at))
    return found


def serving(fleet: FleetState, free: list[FreeCopy], ticket: Ticket) -> ResidencyKey | None:
    """The one of these that serves the ticket; None where none can."""
    home = fleet.home_of(ticket)
    best: tuple[bool, int, float, str] | None = None
    chosen: ResidencyKey | None = None
    for key, copy, in_flight, used_at in free:
        order = rank(in_flight, used_at, copy.instance, home)
        if (best is None or order < best) and can_take(fleet, copy, ticket):
            best, chosen = order, key
    return chosen


def grant(fleet: FleetState, ticket: Ticket, key: ResidencyKey, now: float) -> Grant:
    """Leases a slot of that copy to the ticket."""
    copy = fleet.copies[key]
    used = fleet.take_slot(ticket, key, now).in_flight - 1
    reason = f"{copy.reason}; {used} of {copy.slots} slots were in use"
    url = fleet.instances[copy.instance].spec.url
    return Grant(ticket.id, copy.instance, url, reason, copy.options, copy.context_length)


def _release(fleet: FleetState, event: Released, now: float) -> float | None:
    """Takes a slot back. When its copy is to leave if it stays idle, `_NEVER` where time alone changes nothing; None
    where the copy is to leave at once, and nothing was done.
    """
    lease = fleet.leases.get(event.ticket_id)
    copy = fleet.copies.get(lease.key) if lease is not None else None
    if lease is None or copy is None or copy.loaded_at != lease.loaded_at:
        fleet.end_lease(event.ticket_id, event.output_tokens, now)
        return _NEVER
    use = fleet.use_of(lease.key)
    leaves = use.expires_at
    if use.in_flight == 1 and copy.state is ResidencyState.READY:
        leaves = expiry(use.keep_alive_seconds, now)
    if leaves is not None and leaves <= now:
        return None
    fleet.end_lease(event.ticket_id, event.output_tokens, now)
    use.in_flight, use.used_at, use.expires_at = use.in_flight - 1, now, leaves
    return _NEVER if leaves is None else leaves
