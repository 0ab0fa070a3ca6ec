"""Which loaded copy of a model serves the next request.

Filter (it can serve now), then fewest requests in flight; ties go to the one used longest ago, then by name, so
that equal copies take turns and the same facts always give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.core.entities import InstanceName, InstanceState, Residency, ResidencyState, Snapshot, Ticket
from router.core.placement import context_of


def suits(snapshot: Snapshot, residency: Residency, ticket: Ticket) -> bool:
    """Whether the copy could serve the ticket without a reload, now or when a slot is free."""
    view = snapshot.instances.get(residency.instance)
    if view is None or residency.blob != ticket.model.blob:
        return False
    if ticket.layout is not None and not ticket.layout.allows(view.spec.gpus):
        return False
    if residency.options == ticket.options:
        return True
    return ticket.is_flexible and residency.context_length >= context_of(ticket.options, ticket.model, view.spec)


def can_serve(snapshot: Snapshot, residency: Residency, ticket: Ticket) -> bool:
    """True where the ticket's request starts at once, with no reload and no waiting inside Ollama."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and view.state is InstanceState.READY
        and residency.state is ResidencyState.READY
        and suits(snapshot, residency, ticket)
        and residency.in_flight < residency.slots
        and (residency.instance, residency.blob) not in snapshot.draining
    )


def pick(candidates: Iterable[Residency], home: InstanceName | None = None) -> Residency | None:
    """The copy that served the conversation before, else the one with the fewest requests in flight; None for none.

    Only copies that can serve now are candidates, so a conversation never waits for its home: evaluating its prompt
    again costs less than a wait for a slot.
    """
    return min(candidates, key=lambda r: (r.instance != home, r.in_flight, r.used_at, r.instance), default=None)
