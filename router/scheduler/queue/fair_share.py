"""Which waiting ticket is served next: that of the client that has received the fewest tokens.

Each client has a virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588).
A prompt token counts 1, a generated one 2. The counter of a client that returns after being idle is raised to the
lowest counter of the active clients, so that idle time gives no credit.

Priority comes before fairness. To prevent starvation, a ticket gains one step of priority per minute of waiting, up to
the highest priority that waits, and a ticket close to its deadline is served first. Within a priority, a ticket goes
first that has waited a given time during which its client was not served with this model: tokens that a client received
from other models must not hold it back for longer. A client that floods a model is served with it all the time, so this
is no way round fairness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from heapq import heapify, heappop, heappush

from router.domain.model import BlobDigest
from router.domain.request import Ticket, TicketId
from router.scheduler.balancing.pending_work import expected_output

OUTPUT_WEIGHT = 2.0
_AGING_SECONDS = 60.0
"""Waiting time that counts as one step of priority."""
_ENDING_SHARE = 0.2
"""A ticket is served first when less than this share of its time limit is left."""
_CLIENTS_MAX = 10_000


class TokenCounters:
    """Tokens given to each client. Mutable; drops the client with the fewest when there are too many."""

    __slots__ = ("_given", "_served_at")

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._served_at: dict[tuple[str, BlobDigest], float] = {}
        """When a client was last granted a slot of a model for which others waited, the oldest first."""

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

    def served_before_others(self, ticket: Ticket, now: float) -> None:
        """The ticket was granted a slot while others waited for the same model."""
        key = (ticket.client, ticket.model.blob)
        self._served_at.pop(key, None)
        self._served_at[key] = now
        if len(self._served_at) > _CLIENTS_MAX:
            del self._served_at[next(iter(self._served_at))]

    def is_starved(self, ticket: Ticket, now: float, starving_seconds: float) -> bool:
        """Returns True if it has waited so long, and its client was not served with this model meanwhile."""
        since = max(ticket.arrived_at, self._served_at.get((ticket.client, ticket.model.blob), ticket.arrived_at))
        return now - since >= starving_seconds

    def next_of(self, tickets: Iterable[Ticket], now: float, starving_seconds: float = float("inf")) -> Ticket:
        """The ticket to serve next: by priority with aging, then starved ones, then by the client's counter, then by
        arrival.

        Aging raises a ticket only to the highest waiting priority. Among equal priorities the counters decide;
        otherwise the client that sends most would be first, because it has the oldest requests. Only tickets close to
        their deadline come before all others.
        """
        waiting = list(tickets)
        given, starved = self._given, self._starved(waiting, now, starving_seconds)
        priorities = {ticket.priority for ticket in waiting}
        if len(priorities) == 1:  # aging changes nothing
            return min((_weight(t, given.get(t.client, 0.0), now, starved), t.id, t) for t in waiting)[2]
        top = max(priorities)
        return min(waiting, key=lambda t: (_level(t, top, now), _weight(t, self.given(t.client), now, starved), t.id))

    def order_of(self, tickets: Iterable[Ticket], now: float, starving_seconds: float = float("inf")) -> list[Ticket]:
        """All tickets in the order in which `next_of` would choose them.

        Assumes that each is served before the next is chosen, and that it generates its expected number of tokens.
        """
        remaining, order = {ticket.id: ticket for ticket in tickets}, list[Ticket]()
        given = {ticket.client: self.given(ticket.client) for ticket in remaining.values()}
        starved = self._starved(remaining.values(), now, starving_seconds)
        while remaining:
            chosen = _until_top_falls(list(remaining.values()), given, starved, now)
            for ticket in chosen:
                del remaining[ticket.id]
            order += chosen
        return order

    def _starved(self, tickets: Iterable[Ticket], now: float, starving_seconds: float) -> dict[str, TicketId]:
        """The oldest starved ticket of each client that has one: after that one the client has been served. `tickets`:
        in the order of their arrival."""
        starved: dict[str, TicketId] = {}
        for ticket in tickets:
            if now - ticket.arrived_at < starving_seconds:
                break
            if ticket.client not in starved and self.is_starved(ticket, now, starving_seconds):
                starved[ticket.client] = ticket.id
        return starved

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


def _weight(ticket: Ticket, given: float, now: float, starved: Mapping[str, TicketId]) -> float:
    if _is_ending(ticket, now) or (starved and starved.get(ticket.client) == ticket.id):
        return -1.0
    return given


def _until_top_falls(
    tickets: list[Ticket], given: dict[str, float], starved: dict[str, TicketId], now: float
) -> list[Ticket]:
    """The first tickets in serving order, up to the last one of the highest priority; after it, levels are recomputed.

    Adds the expected tokens of these tickets to `given`, and removes their clients from `starved`.
    """
    top = max(ticket.priority for ticket in tickets)
    top_count = sum(ticket.priority == top for ticket in tickets)
    by_client: dict[str, deque[tuple[int, Ticket]]] = {}
    ranked = ((_level(t, top, now), t) for t in tickets)
    for level, ticket in sorted(ranked, key=lambda pair: (pair[0], _weight(pair[1], 0.0, now, starved), pair[1].id)):
        by_client.setdefault(ticket.client, deque()).append((level, ticket))

    def head(client: str) -> tuple[int, float, int, str]:
        level, ticket = by_client[client][0]
        return (level, _weight(ticket, given[client], now, starved), ticket.id, client)

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
        starved.pop(client, None)
        if waiting:
            heappush(heads, head(client))
    return chosen
