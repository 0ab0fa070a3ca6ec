"""The tickets that wait, in order of arrival, grouped by what they wait for.

A group is one weights blob with one set of runner options, and one mind about cards and about copies with other
options: whatever serves one of its tickets serves them all. Groups are served in the order of their oldest ticket. The
queue is bounded by whoever fills it; it only keeps order.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.core.entities import BlobDigest, Layout, RunnerOptions, Ticket, TicketId

GroupKey = tuple[BlobDigest, RunnerOptions, Layout | None, bool]


def group_of(ticket: Ticket) -> GroupKey:
    return (ticket.model.blob, ticket.options, ticket.layout, ticket.is_flexible)


class WaitQueue:
    """Waiting tickets by group; insertion order is arrival order."""

    __slots__ = ("_groups", "_tickets")

    def __init__(self) -> None:
        self._tickets: dict[TicketId, Ticket] = {}
        self._groups: dict[GroupKey, dict[TicketId, Ticket]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, ticket_id: TicketId) -> bool:
        return ticket_id in self._tickets

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets.values())

    def add(self, ticket: Ticket) -> None:
        self._tickets[ticket.id] = ticket
        self._groups.setdefault(group_of(ticket), {})[ticket.id] = ticket

    def remove(self, ticket_id: TicketId) -> Ticket | None:
        """Takes a ticket out wherever it stands; None where it does not wait."""
        ticket = self._tickets.pop(ticket_id, None)
        if ticket is not None:
            group = self._groups[group_of(ticket)]
            del group[ticket_id]
            if not group:
                del self._groups[group_of(ticket)]
        return ticket

    def heads(self) -> list[Ticket]:
        """The oldest ticket of each group, oldest first (ids grow with arrival)."""
        return sorted((next(iter(group.values())) for group in self._groups.values()), key=lambda t: t.id)

    def group(self, key: GroupKey) -> list[Ticket]:
        return list(self._groups.get(key, {}).values())

    def waits_for(self, blob: BlobDigest) -> bool:
        return any(key[0] == blob for key in self._groups)

    def expired(self, now: float) -> list[Ticket]:
        return [ticket for ticket in self._tickets.values() if ticket.deadline <= now]

    def next_deadline(self) -> float | None:
        return min((ticket.deadline for ticket in self._tickets.values()), default=None)
