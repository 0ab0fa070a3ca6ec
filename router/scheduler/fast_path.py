"""The short way of the dispatcher, for the two events that every request brings while nothing waits and nothing loads.

It gives the very actions and leaves the very state of the long way (`router/scheduler/dispatcher.py`), at a tenth of
the cost; a test plays random lives through both. Whatever it is not sure to do alike it leaves to the long way, by
giving None. It reads the copies without writing their use into them first, which is what the long way would spend its
time on.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.actions import Action
from router.domain.events import Arrived, Event, Released
from router.domain.model import BlobDigest
from router.domain.request import Ticket
from router.domain.residency import ResidencyKey, ResidencyState
from router.scheduler.balancing.replica_choice import grant
from router.scheduler.balancing.replica_scorer import can_take
from router.scheduler.state import FleetState, expiry

_NEVER = float("inf")


def handle(fleet: FleetState, event: Event, now: float) -> list[Action] | None:
    """What the event brings, where the queue is empty and nobody shuts down; None where the long way must be gone."""
    if fleet.reservations or fleet.draining or fleet.restarts_due or fleet.wake is None:
        return None
    wake = fleet.wake[0]
    if wake is not None and wake <= now:
        return None
    if isinstance(event, Arrived):
        actions = _arrive(fleet, event.ticket, now)
        if wake is not None:
            fleet.wake = None  # what would have left may stay now
        return actions
    if not isinstance(event, Released) or event.runner_lost or event.silent_seconds:
        return None
    leaves = _release(fleet, event, now)
    if leaves is None:
        return None
    if leaves < (_NEVER if wake is None else wake):
        fleet.wake = (leaves,)
    return []


def _arrive(fleet: FleetState, ticket: Ticket, now: float) -> list[Action] | None:
    """Grants the ticket at once; None where no copy can take it."""
    free, replicas = free_replicas(fleet, ticket.model.blob)
    able = serving(fleet, free, ticket)
    if not able:
        return None
    fleet.record_request(ticket, now)
    return [grant(fleet, able, replicas, ticket, now)]


def free_replicas(fleet: FleetState, blob: BlobDigest) -> tuple[list[ResidencyKey], int]:
    """Copies of these weights that have a slot left, and how many there are in all."""
    found: list[ResidencyKey] = []
    uses, replicas = fleet.uses, 0
    for key, replica in fleet.replicas.items():
        if key[1] == blob:
            replicas += 1
            if (uses.get(key) or replica).in_flight < replica.slots:
                found.append(key)
    return found, replicas


def serving(fleet: FleetState, free: Sequence[ResidencyKey], ticket: Ticket) -> list[ResidencyKey]:
    """Those of these, copies of its weights, that can serve the ticket now."""
    replicas = fleet.replicas
    return [key for key in free if can_take(fleet, replicas[key], ticket)]


def _release(fleet: FleetState, event: Released, now: float) -> float | None:
    """Takes a slot back. When its copy is to leave if it stays idle, `_NEVER` where time alone changes nothing; None
    where the copy is to leave at once, and nothing was done.
    """
    lease = fleet.leases.get(event.ticket_id)
    replica = fleet.replicas.get(lease.key) if lease is not None else None
    if lease is None or replica is None or replica.loaded_at != lease.loaded_at:
        fleet.end_lease(event, now)
        return _NEVER
    use = fleet.use_of(lease.key)
    leaves = use.expires_at
    if use.in_flight == 1 and replica.state is ResidencyState.READY:
        leaves = expiry(use.keep_alive_seconds, now)
    if leaves is not None and leaves <= now:
        return None
    fleet.end_lease(event, now)
    use.in_flight, use.used_at, use.expires_at = use.in_flight - 1, now, leaves
    return _NEVER if leaves is None else leaves
