"""Remembers the facts of the latest placements, so that people can be told later what else was possible. Bounded.

Only loads are remembered: they are rare, and each takes seconds. A placement costs one copy of the snapshot's mappings;
the candidates are worked out when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts
from router.domain.request import Ticket, TicketId
from router.domain.snapshot import Snapshot
from router.scheduler.placement.placement import Placed, PlacementRequest

_PLACEMENTS_MAX = 32


@dataclass(frozen=True, slots=True)
class PastPlacement:
    """One decision to load a model, with the facts it was made from."""

    tickets: frozenset[TicketId]
    """Those that the load was planned for."""
    model: ModelFacts
    snapshot: Snapshot
    request: PlacementRequest
    decision: Placed


class PlacementMemory:
    """The latest placements, oldest first."""

    __slots__ = ("_placements",)

    def __init__(self) -> None:
        self._placements: deque[PastPlacement] = deque(maxlen=_PLACEMENTS_MAX)

    def remember(
        self, snapshot: Snapshot, tickets: Sequence[Ticket], request: PlacementRequest, decision: Placed
    ) -> None:
        """Keeps a placement for these tickets; `snapshot` as it was before."""
        ids = frozenset(ticket.id for ticket in tickets)
        self._placements.append(PastPlacement(ids, tickets[0].model, _kept(snapshot), request, decision))

    def find(self, ticket_id: TicketId) -> PastPlacement | None:
        """The latest placement for the ticket; None if there was none, or it is forgotten."""
        return next((each for each in reversed(self._placements) if ticket_id in each.tickets), None)


def _kept(snapshot: Snapshot) -> Snapshot:
    """A snapshot whose mappings are its own: those of the original are views of the present state."""
    return replace(
        snapshot,
        gpus=dict(snapshot.gpus),
        instances=dict(snapshot.instances),
        residencies=dict(snapshot.residencies),
        changed_on=dict(snapshot.changed_on),
        reservations=dict(snapshot.reservations),
        demand=dict(snapshot.demand),
        wanted=dict(snapshot.wanted),
        warm_missing=dict(snapshot.warm_missing),
    )
