"""Chooses among the copies of a model that can serve now: gathers what is known of each, for `balance` to rank.

Both ways of the dispatcher, the long and the short, choose here. It changes nothing: what it returns is put into the
books when the slot is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from router.core.balance import Prospect, best, waiting_seconds, words_for
from router.core.entities import ResidencyKey, Ticket
from router.core.state import FleetState
from router.core.work import Share, Work, expected_output


class Choice(NamedTuple):
    key: ResidencyKey
    share: Share
    words: str
    """Why this copy, to go on with a grant's reason; "" where there was no other."""


def choose(fleet: FleetState, able: Sequence[ResidencyKey], ticket: Ticket, now: float) -> Choice:
    """One of `able`: copies of the ticket's model that could each serve it now, at least one."""
    output = expected_output(ticket)
    prospects: list[Prospect] = []
    shares: list[Share] = []
    turn = fleet.homes.turn_of(ticket)
    for key in able:
        copy = fleet.copies[key]
        use = fleet.uses.get(key) or copy
        held = min(turn.held_by(copy), ticket.prompt_tokens) if turn is not None else 0
        fresh = ticket.prompt_tokens - held
        work = fleet.works.get(key) or Work()
        pace = fleet.speeds.pace(fleet.instances[key[0]].spec, ticket.model, fleet.gpus)
        seconds = waiting_seconds(pace, work, fresh, output, use.in_flight, now)
        prospects.append(Prospect(seconds, held, use.in_flight, use.used_at, key[0]))
        shares.append(Share(work, pace, work.ahead_seconds(now), fresh, fresh >= held, output, use.in_flight))
    chosen = best(prospects)
    index = prospects.index(chosen)
    return Choice(able[index], shares[index], words_for(prospects, chosen))
