"""Which loaded copy of a model serves the next request.

Filter (it can serve now), then the copy that served the conversation before, then the fewest requests in flight; ties
go to the one used longest ago, then by name, so that equal copies take turns and the same facts always give the same
answer. A conversation never waits for its home: evaluating its prompt again costs less than waiting for a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Protocol

from router.core.entities import (
    InstanceName,
    InstanceState,
    InstanceView,
    Residency,
    ResidencyKey,
    ResidencyState,
    Ticket,
)
from router.core.placement import context_of


class Fleet(Protocol):
    """What is looked at beside the copies: a snapshot has it."""

    @property
    def instances(self) -> Mapping[InstanceName, InstanceView]: ...

    @property
    def draining(self) -> Set[ResidencyKey]: ...


def suits(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """Whether the copy could serve the ticket without a reload, now or when a slot is free."""
    view = snapshot.instances.get(residency.instance)
    if view is None or residency.blob != ticket.model.blob:
        return False
    if ticket.layout is not None and not ticket.layout.allows(view.spec.gpus):
        return False
    if residency.options == ticket.options:
        return True
    return ticket.is_flexible and residency.context_length >= context_of(ticket.options, ticket.model, view.spec)


def can_take(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """True where only a free slot may be lacking."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and view.state is InstanceState.READY
        and residency.state is ResidencyState.READY
        and suits(snapshot, residency, ticket)
        and (residency.instance, residency.blob) not in snapshot.draining
    )


def rank(
    in_flight: int, used_at: float, instance: InstanceName, home: InstanceName | None
) -> tuple[bool, int, float, str]:
    """The least is taken."""
    return instance != home, in_flight, used_at, instance
