"""The waiting tickets in groups. The tickets of a group can share one replica.

A group has one weights blob, one set of runner options (or any, if its tickets can be adapted) and one layout. Groups
are served by priority, then by age, of their oldest ticket. Within a group, `scheduler/queue/fair_share.py` chooses the
next. The limit on the length of the queue is checked by the dispatcher.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import NamedTuple, TypeVar

from router.domain.model import BlobDigest
from router.domain.request import Layout, RunnerOptions, Ticket, TicketId

_Counted = TypeVar("_Counted")


class GroupKey(NamedTuple):
    """What the tickets of a group have in common."""

    blob: BlobDigest
    options: RunnerOptions | None
    """None: any, because the requests are adapted to the replica."""
    layout: Layout | None
    takes_default_context: bool = False


def group_of(ticket: Ticket) -> GroupKey:
    options = None if ticket.is_flexible else ticket.options
    return GroupKey(ticket.model.blob, options, ticket.layout, ticket.takes_default_context)


class WaitQueue:
    """Waiting tickets by group; insertion order is arrival order."""

    __slots__ = ("_by_blob", "_by_priority", "_clients", "_deadlines", "_groups", "_wanted", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[TicketId, Ticket] = {}
        """Waiting tickets in the order of arrival; changed only here."""
        self._groups: dict[GroupKey, dict[TicketId, Ticket]] = {}
        self._by_blob: dict[BlobDigest, dict[GroupKey, dict[TicketId, Ticket]]] = {}
        """The same groups by weights."""
        self._by_priority: dict[int, dict[str, dict[TicketId, Ticket]]] = {}
        """By priority, then client."""
        self._clients: dict[str, int] = {}
        self._wanted: dict[BlobDigest, int] = {}
        self._deadlines: list[tuple[float, TicketId]] = []
        """A heap; entries of removed tickets are dropped when they reach the top."""

    def add(self, ticket: Ticket) -> None:
        heapq.heappush(self._deadlines, (ticket.deadline, ticket.id))
        self.tickets[ticket.id] = ticket
        key = group_of(ticket)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = {}
            self._by_blob.setdefault(key.blob, {})[key] = group
        group[ticket.id] = ticket
        self._by_priority.setdefault(ticket.priority, {}).setdefault(ticket.client, {})[ticket.id] = ticket
        _count(self._clients, ticket.client, 1)
        _count(self._wanted, ticket.model.blob, 1)

    def remove(self, ticket_id: TicketId) -> Ticket | None:
        """Removes and returns a ticket; None if it is not in the queue."""
        ticket = self.tickets.pop(ticket_id, None)
        if ticket is not None:
            key = group_of(ticket)
            group = self._groups[key]
            del group[ticket_id]
            if not group:
                del self._groups[key]
                same_blob = self._by_blob[key.blob]
                del same_blob[key]
                if not same_blob:
                    del self._by_blob[key.blob]
            self._remove_from_priority(ticket)
            _count(self._clients, ticket.client, -1)
            _count(self._wanted, ticket.model.blob, -1)
        return ticket

    def _remove_from_priority(self, ticket: Ticket) -> None:
        clients = self._by_priority[ticket.priority]
        waiting = clients[ticket.client]
        del waiting[ticket.id]
        if not waiting:
            del clients[ticket.client]
            if not clients:
                del self._by_priority[ticket.priority]

    def shed_for(self, newcomer: Ticket) -> Ticket | None:
        """The waiting ticket that gives up its place in a full queue to the newcomer; None if none should.

        Of the lowest priority that waits, the newest ticket of the client with the most tickets there. At the
        newcomer's own priority only a client with more tickets than the newcomer's would have gives up one.
        """
        lowest = min(self._by_priority, default=newcomer.priority)
        clients = self._by_priority.get(lowest)
        if clients is None or lowest > newcomer.priority:
            return None
        greediest = max(clients.values(), key=len)
        if lowest == newcomer.priority and len(greediest) <= len(clients.get(newcomer.client, ())) + 1:
            return None
        return next(reversed(greediest.values()))

    def groups(self, blobs: Collection[BlobDigest] | None = None) -> list[GroupKey]:
        """The groups in serving order: by priority, then age, of their oldest ticket.

        `blobs`: only groups that wait for these weights.
        """
        tables = [self._groups] if blobs is None else [self._by_blob.get(blob, {}) for blob in blobs]
        chosen = [item for table in tables for item in table.items()]
        heads = [(next(iter(group.values())), key) for key, group in chosen]
        return [key for _, key in sorted(heads, key=lambda pair: (-pair[0].priority, pair[0].id))]

    def unsorted(self) -> Iterable[GroupKey]:
        """The groups in any order."""
        return self._groups.keys()

    def heads(self) -> list[Ticket]:
        """The oldest ticket of each group, in serving order."""
        return [next(iter(self._groups[key].values())) for key in self.groups()]

    def group(self, key: GroupKey) -> list[Ticket]:
        return list(self._groups.get(key, {}).values())

    def has_group(self, key: GroupKey) -> bool:
        return key in self._groups

    def waits_for(self, blob: BlobDigest) -> bool:
        return blob in self._wanted

    def wanted(self) -> dict[BlobDigest, int]:
        """Number of waiting tickets by model."""
        return self._wanted.copy()

    def has_client(self, client: str) -> bool:
        return client in self._clients

    def clients(self) -> frozenset[str]:
        """Clients with waiting tickets."""
        return frozenset(self._clients)

    def greedy_clients(self) -> frozenset[str]:
        """Clients with more waiting tickets than the average of all that wait."""
        clients = self._clients
        if len(clients) < 2:
            return frozenset()
        mean = len(self.tickets) / len(clients)
        return frozenset(client for client, count in clients.items() if count > mean)

    def expired(self, now: float) -> list[Ticket]:
        """Tickets whose deadline has passed, oldest first."""
        deadline = self.next_deadline()
        if deadline is None or deadline > now:
            return []
        return [ticket for ticket in self.tickets.values() if ticket.deadline <= now]

    def next_deadline(self) -> float | None:
        """The earliest deadline of a waiting ticket; None if the queue is empty."""
        while self._deadlines:
            deadline, ticket_id = self._deadlines[0]
            ticket = self.tickets.get(ticket_id)
            if ticket is not None and ticket.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None


def _count(counts: dict[_Counted, int], key: _Counted, change: int) -> None:
    """Adds to a count; removes the key at zero."""
    count = counts.get(key, 0) + change
    if count:
        counts[key] = count
    else:
        del counts[key]
