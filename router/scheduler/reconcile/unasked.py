"""Loads that nobody waits for: they begin while nothing is asked (`scheduler/placement/rest.py`), and give way.

Such a load is broken off as soon as a ticket waits whose model has no replica, loaded or coming, and nobody waits for
the unasked model. Its plan is dropped if it was not sent. If it was, its request is dropped, which ends the load on the
server, and the model is unloaded like any other: its reservation stands until a reading of the GPUs shows the room,
because the server may be about to take more.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from router.domain.actions import AbortLoad, Action, UnloadCause
from router.domain.ids import LoadId
from router.domain.model import BlobDigest, ModelFacts
from router.domain.reservation import Reservation
from router.domain.residency import ResidencyState
from router.domain.snapshot import Estimate
from router.scheduler.placement.rest import at_rest
from router.scheduler.placement.search import coming
from router.scheduler.reconcile import reservations
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState


def begin(
    fleet: FleetState,
    models: Mapping[BlobDigest, ModelFacts],
    dismissed: Set[BlobDigest],
    estimate: Estimate,
    load_id: LoadId,
    now: float,
) -> list[Action]:
    """Plans the model to be loaded while nothing is asked, if there is one."""
    found = at_rest(fleet.snapshot(now), models, dismissed, estimate)
    if found is None:
        return []
    model, placed = found
    placed = replace(placed, reason=f"{placed.reason}; unasked, since it is requested often and takes long to load")
    actions = reservations.begin(fleet, model, placed, load_id, now)
    planned = fleet.reservations.get(load_id)
    if planned is not None:
        fleet.put_reservation(replace(planned, is_unasked=True))
    return actions


def is_under_way(fleet: FleetState) -> bool:
    """Whether a load that nobody waited for is planned or runs, and is not broken off."""
    if fleet.policy.rest is None:
        return False
    return any(map(is_unasked_under_way, fleet.reservations.values()))


def is_unasked_under_way(reservation: Reservation) -> bool:
    """Whether nobody waited for the load, and it is planned or runs, and is not broken off."""
    return reservation.is_unasked and reservation.aborted_at is None and reservation.finished_at is None


def give_way(fleet: FleetState, now: float) -> list[Action]:
    """Breaks off what nobody waits for where a ticket needs a place. What somebody waits for by now is asked."""
    actions: list[Action] = []
    if not fleet.wanted or not is_under_way(fleet):
        return actions
    snapshot = fleet.snapshot(now)
    is_needed = any(not coming(snapshot, blob) for blob in fleet.wanted)
    for reservation in list(fleet.reservations.values()):
        if not is_unasked_under_way(reservation):
            continue
        if reservation.blob in fleet.wanted:
            fleet.put_reservation(replace(reservation, is_unasked=False))
        elif is_needed:
            actions += _break_off(fleet, reservation, now)
    return actions


def _break_off(fleet: FleetState, reservation: Reservation, now: float) -> list[Action]:
    key = (reservation.instance, reservation.blob)
    residency = fleet.residencies.get(key)
    if residency is None:
        return []
    if residency.state is not ResidencyState.LOADING:
        reservations.drop(fleet, residency)
        return []
    fleet.put_reservation(replace(reservation, aborted_at=now))
    reason = "nobody waits for it, and its room is needed"
    unload = rules.unload(fleet, key, reason, UnloadCause.EVICTED)
    return [AbortLoad(reservation.load_id, reservation.instance, reason), unload]
