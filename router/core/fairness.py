"""Who of several waiting clients is next: the one that has been given least, counted in tokens.

A virtual token counter for each client (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588):
prompt tokens weigh one, generated ones two; whoever comes back from being idle is lifted to the least of those that
wait, so that nobody saves up. Priority goes before fairness, and a ticket gains one step of it for every minute that it
has waited, up to the highest that waits, so that nobody starves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.core.entities import Ticket

OUTPUT_WEIGHT = 2.0
_AGING_SECONDS = 60.0
"""Of waiting count as one step of priority against tickets of a higher one; between equals the counters decide."""
_CLIENTS_MAX = 10_000


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
        counters decide, or whoever sends most would come first for having the oldest requests.
        """
        waiting = list(tickets)
        priorities = {ticket.priority for ticket in waiting}
        if len(priorities) == 1:  # all are the highest, whatever their age
            given = self._given
            return min(waiting, key=lambda t: (given.get(t.client, 0.0), t.id))
        top = max(priorities)
        return min(waiting, key=lambda t: (-min(top, _urgency(t, now)), self.given(t.client), t.id))

    def _add(self, client: str, tokens: float) -> None:
        self._given[client] = self.given(client) + tokens
        if len(self._given) > _CLIENTS_MAX:
            del self._given[min(self._given, key=lambda name: (self._given[name], name))]


def _urgency(ticket: Ticket, now: float) -> int:
    return ticket.priority + int(max(0.0, now - ticket.arrived_at) / _AGING_SECONDS)
