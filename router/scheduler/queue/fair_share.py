"""Who of several waiting clients is next: the one that has been given least, counted in tokens.

A virtual token counter for each client (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588):
prompt tokens weigh one, generated ones two; whoever comes back from being idle is lifted to the least of those that
wait, so that nobody saves up. Priority goes before fairness, and a ticket gains one step of it for every minute that it
has waited, up to the highest that waits, and goes first before it would be given up, so that nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush

from router.domain.request import Ticket

OUTPUT_WEIGHT = 2.0
_AGING_SECONDS = 60.0
"""Of waiting count as one step of priority against tickets of a higher one; between equals the counters decide."""
_ENDING_SHARE = 0.2
"""Of the time that a ticket may wait: with less than that left it goes first."""
_CLIENTS_MAX = 10_000
_GUESSED_OUTPUT_TOKENS = 256
"""Of a request that has not been served yet, where it does not ask for less."""


class TokenCounters:
    """Counters by client; forgets the least served where there are too many."""

    __slots__ = ("_given",)

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    def given(self, client: str) -> float:
        return self._given.get(client, 0.0)

    def arrived(self, client: str, active: Collection[str]) -> None:
        """`active`: clients that wait or run already; one that is not among them has been idle."""
        if active and client not in active:
            self._given[client] = max(self.given(client), min(map(self.given, active)))

    def granted(self, ticket: Ticket) -> None:
        self._add(ticket.client, float(ticket.prompt_tokens))

    def released(self, client: str, output_tokens: int) -> None:
        self._add(client, OUTPUT_WEIGHT * output_tokens)

    def next_of(self, tickets: Iterable[Ticket], now: float) -> Ticket:
        """By priority with aging, then by what the client was given, then by arrival.

        Aging lifts a ticket to the highest priority that waits and not above it: among those of the highest the
        counters decide, or whoever sends most would come first for having the oldest requests. Only who has waited
        for nearly as long as he may goes before all others, or he would have waited in vain.
        """
        waiting = list(tickets)
        priorities = {ticket.priority for ticket in waiting}
        if len(priorities) == 1:  # all are the highest, whatever their age
            given = self._given
            return min((_weight(t, given.get(t.client, 0.0), now), t.id, t) for t in waiting)[2]
        top = max(priorities)
        return min(waiting, key=lambda t: (_level(t, top, now), _weight(t, self.given(t.client), now), t.id))

    def order_of(self, tickets: Iterable[Ticket], now: float) -> list[Ticket]:
        """All of them in the order in which `next_of` would choose them, if each were served before the next is chosen
        and took the tokens of its prompt and a guess of those that it generates."""
        left, order = {ticket.id: ticket for ticket in tickets}, list[Ticket]()
        given = {ticket.client: self.given(ticket.client) for ticket in left.values()}
        while left:
            chosen = _until_top_falls(list(left.values()), given, now)
            for ticket in chosen:
                del left[ticket.id]
            order += chosen
        return order

    def _add(self, client: str, tokens: float) -> None:
        self._given[client] = self.given(client) + tokens
        if len(self._given) > _CLIENTS_MAX:
            del self._given[min(self._given, key=lambda name: (self._given[name], name))]


def _urgency(ticket: Ticket, now: float) -> int:
    return ticket.priority + int(max(0.0, now - ticket.arrived_at) / _AGING_SECONDS)


def _is_ending(ticket: Ticket, now: float) -> bool:
    """Whether most of the time that it may wait is over."""
    return ticket.deadline - now <= _ENDING_SHARE * (ticket.deadline - ticket.arrived_at)


def _level(ticket: Ticket, top: int, now: float) -> int:
    return -top if _is_ending(ticket, now) else -min(top, _urgency(ticket, now))


def _weight(ticket: Ticket, given: float, now: float) -> float:
    return -1.0 if _is_ending(ticket, now) else given


def _until_top_falls(tickets: list[Ticket], given: dict[str, float], now: float) -> list[Ticket]:
    """The first of these in their order, until the last of the highest priority is among them: the others are weighed
    anew after that. `given` grows."""
    top = max(ticket.priority for ticket in tickets)
    highest = sum(ticket.priority == top for ticket in tickets)
    lines: dict[str, deque[tuple[int, Ticket]]] = {}
    ranked = ((_level(t, top, now), t) for t in tickets)
    for level, ticket in sorted(ranked, key=lambda one: (one[0], _weight(one[1], 0.0, now), one[1].id)):
        lines.setdefault(ticket.client, deque()).append((level, ticket))

    def head(client: str) -> tuple[int, float, int, str]:
        level, ticket = lines[client][0]
        return (level, _weight(ticket, given[client], now), ticket.id, client)

    heads = [head(client) for client in lines]
    heapify(heads)
    chosen: list[Ticket] = []
    while highest:
        client = heappop(heads)[3]
        line = lines[client]
        ticket = line.popleft()[1]
        chosen.append(ticket)
        highest -= ticket.priority == top
        given[client] += _expected_tokens(ticket)
        if line:
            heappush(heads, head(client))
    return chosen


def _expected_tokens(ticket: Ticket) -> float:
    most = ticket.output_tokens_max
    output = _GUESSED_OUTPUT_TOKENS if most is None or most < 0 else min(most, _GUESSED_OUTPUT_TOKENS)
    return ticket.prompt_tokens + OUTPUT_WEIGHT * output
