"""Which waiting ticket is served next: that of the client that has received the fewest tokens.

Each client has a virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588).
A prompt token counts 1, a generated one 2. The counter of a client that returns after being idle is raised to the
lowest counter of the active clients, so that idle time gives no credit.

Priority comes before fairness. To prevent starvation, a ticket gains one step of priority per minute of waiting, up to
the highest priority that waits, and a ticket close to its deadline is served first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush

from router.domain.request import Ticket
from router.scheduler.balancing.pending_work import expected_output

OUTPUT_WEIGHT = 2.0
_AGING_SECONDS = 60.0
"""Waiting time that counts as one step of priority."""
_ENDING_SHARE = 0.2
"""A ticket is served first when less than this share of its time limit is left."""
_CLIENTS_MAX = 10_000


class TokenCounters:
    """Tokens given to each client. Mutable; drops the client with the fewest when there are too many."""

    __slots__ = ("_given",)

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    def given(self, client: str) -> float:
        """Weighted tokens that the client has received."""
        return self._given.get(client, 0.0)

    def arrived(self, client: str, active: Collection[str]) -> None:
        """A request of the client arrived. `active`: clients with waiting or running requests; others were idle."""
        if active and client not in active:
            self._given[client] = max(self.given(client), min(map(self.given, active)))

    def granted(self, ticket: Ticket) -> None:
        self._add(ticket.client, float(ticket.prompt_tokens))

    def released(self, client: str, output_tokens: int) -> None:
        self._add(client, OUTPUT_WEIGHT * output_tokens)

    def next_of(self, tickets: Iterable[Ticket], now: float) -> Ticket:
        """The ticket to serve next: by priority with aging, then by the client's counter, then by arrival.

        Aging raises a ticket only to the highest waiting priority. Among equal priorities the counters decide;
        otherwise the client that sends most would be first, because it has the oldest requests. Only tickets close to
        their deadline come before all others.
        """
        waiting = list(tickets)
        priorities = {ticket.priority for ticket in waiting}
        if len(priorities) == 1:  # aging changes nothing
            given = self._given
            return min((_weight(t, given.get(t.client, 0.0), now), t.id, t) for t in waiting)[2]
        top = max(priorities)
        return min(waiting, key=lambda t: (_level(t, top, now), _weight(t, self.given(t.client), now), t.id))

    def order_of(self, tickets: Iterable[Ticket], now: float) -> list[Ticket]:
        """All tickets in the order in which `next_of` would choose them.

        Assumes that each is served before the next is chosen, and that it generates its expected number of tokens.
        """
        remaining, order = {ticket.id: ticket for ticket in tickets}, list[Ticket]()
        given = {ticket.client: self.given(ticket.client) for ticket in remaining.values()}
        while remaining:
            chosen = _until_top_falls(list(remaining.values()), given, now)
            for ticket in chosen:
                del remaining[ticket.id]
            order += chosen
        return order

    def _add(self, client: str, tokens: float) -> None:
        self._given[client] = self._given.get(client, 0.0) + tokens
        if len(self._given) > _CLIENTS_MAX:
            del self._given[min(self._given, key=lambda name: (self._given[name], name))]


def _urgency(ticket: Ticket, now: float) -> int:
    return ticket.priority + int(max(0.0, now - ticket.arrived_at) / _AGING_SECONDS)


def _is_ending(ticket: Ticket, now: float) -> bool:
    """Returns True if the ticket is close to its deadline."""
    return ticket.deadline - now <= _ENDING_SHARE * (ticket.deadline - ticket.arrived_at)


def _level(ticket: Ticket, top: int, now: float) -> int:
    return -top if _is_ending(ticket, now) else -min(top, _urgency(ticket, now))


def _weight(ticket: Ticket, given: float, now: float) -> float:
    return -1.0 if _is_ending(ticket, now) else given


def _until_top_falls(tickets: list[Ticket], given: dict[str, float], now: float) -> list[Ticket]:
    """The first tickets in serving order, up to the last one of the highest priority; after it, levels are recomputed.

    Adds the expected tokens of these tickets to `given`.
    """
    top = max(ticket.priority for ticket in tickets)
    top_count = sum(ticket.priority == top for ticket in tickets)
    by_client: dict[str, deque[tuple[int, Ticket]]] = {}
    ranked = ((_level(t, top, now), t) for t in tickets)
    for level, ticket in sorted(ranked, key=lambda pair: (pair[0], _weight(pair[1], 0.0, now), pair[1].id)):
        by_client.setdefault(ticket.client, deque()).append((level, ticket))

    def head(client: str) -> tuple[int, float, int, str]:
        level, ticket = by_client[client][0]
        return (level, _weight(ticket, given[client], now), ticket.id, client)

    heads = [head(client) for client in by_client]
    heapify(heads)
    chosen: list[Ticket] = []
    while top_count:
        client = heappop(heads)[3]
        waiting = by_client[client]
        ticket = waiting.popleft()[1]
        chosen.append(ticket)
        top_count -= ticket.priority == top
        given[client] += ticket.prompt_tokens + OUTPUT_WEIGHT * expected_output(ticket)
        if waiting:
            heappush(heads, head(client))
    return chosen
