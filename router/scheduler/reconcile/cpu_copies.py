"""Copies of small models on the CPU (`scheduler/placement/cpu_overflow.py`): when they are loaded and unloaded, who is
served there, and what their loads and answers say of their speed."""

from __future__ import annotations

from router.domain.actions import Action, Grant, UnloadCause
from router.domain.events import LoadFailed, LoadFinished, Released
from router.domain.ids import LoadId
from router.domain.measured_speed import UNUSABLE
from router.domain.request import Ticket
from router.domain.snapshot import Estimate
from router.scheduler.balancing.pending_work import WorkShare, expected_output
from router.scheduler.placement.cpu_overflow import OnCpu, copy_to_load, corrected, to_unload
from router.scheduler.reconcile import reservations
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState, LeaseRecord


def keep(fleet: FleetState, estimate: Estimate, load_id: LoadId, now: float) -> list[Action]:
    """Unloads what should not be there, and plans the next copy."""
    leaving = list(to_unload(fleet.snapshot(now)))
    if leaving:
        return [rules.unload(fleet, key, why, UnloadCause.EVICTED) for key, why in leaving]
    found = copy_to_load(fleet.snapshot(now), fleet.models, fleet.dismissed, estimate)
    return [] if found is None else reservations.begin(fleet, *found, load_id, now)


def grant(fleet: FleetState, ticket: Ticket, found: OnCpu, now: float) -> Grant:
    """Grants the ticket the slot of a copy."""
    replica = fleet.replicas[found.key]
    share = WorkShare(0.0, expected_output(ticket), ticket.prompt_tokens, 0)
    used = fleet.take_slot(ticket, found.key, now, share).in_flight - 1
    url = fleet.instances[found.key[0]].spec.url
    return Grant(
        ticket.id, found.key[0], url, found.reason, used, replica.slots, None, replica.options, replica.context_length
    )


def load_ended(fleet: FleetState, event: LoadFinished | LoadFailed) -> None:
    """Remembers the speed that a load has measured; to be called before the event is applied."""
    residency = fleet.by_load(event.load_id)
    if residency is None or residency.instance not in fleet.overflow:
        return
    if isinstance(event, LoadFinished):
        fleet.set_cpu_speed(residency.blob, event.speed or UNUSABLE)
    elif not event.is_lost:
        fleet.set_cpu_speed(residency.blob, UNUSABLE)


def answered(fleet: FleetState, lease: LeaseRecord, event: Released, now: float) -> None:
    """Corrects the speed by an answer that came from a copy."""
    blob, first_at = lease.key[1], event.first_byte_at
    known = fleet.cpu_speeds.get(blob)
    if known is None or lease.share is None or first_at is None or event.failure is not None or event.runner_lost:
        return
    times = (lease.granted_at, first_at, now)
    fleet.set_cpu_speed(blob, corrected(known, lease.share.sample_tokens, event.output_tokens, times))
