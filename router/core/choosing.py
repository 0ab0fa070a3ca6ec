"""Chooses among the copies of a model that can serve now: gathers what is known of each, for `balance` to rank.

Both ways of the dispatcher, the long and the short, choose and grant here. It looks at no queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.core.affinity import Held
from router.core.balance import Prospect, best, waiting_seconds, words_for
from router.core.entities import ResidencyKey, Ticket
from router.core.events import Grant
from router.core.speeds import Pace
from router.core.state import FleetState
from router.core.work import IDLE, Share, expected_output, telling

_NOWHERE: Held = {}


def grant(fleet: FleetState, able: Sequence[ResidencyKey], copies: int, ticket: Ticket, now: float) -> Grant:
    """The ticket gets a slot of one of `able`, copies of its model that could each serve it now.

    `copies`: how many there are in all, loaded or on their way. Where it is the only one nothing is weighed or noted.
    """
    key, share, words = choose(fleet, able, ticket, now) if copies > 1 else (able[0], None, "")
    copy = fleet.copies[key]
    used = fleet.take_slot(ticket, key, now, share).in_flight - 1
    reason = f"{copy.reason}; {used} of {copy.slots} slots were in use{words}"
    return Grant(ticket.id, key[0], fleet.instances[key[0]].spec.url, reason, copy.options, copy.context_length)


def choose(
    fleet: FleetState, able: Sequence[ResidencyKey], ticket: Ticket, now: float
) -> tuple[ResidencyKey, Share, str]:
    """One of `able`, at least one. Changes nothing.

    With the request's part in its work, and why that copy, to go on with a grant's reason; "" where there was no other.
    """
    tokens, output = ticket.prompt_tokens, expected_output(ticket)
    copies, uses, works, speeds = fleet.copies, fleet.uses, fleet.works, fleet.speeds
    homes, blob = fleet.homes, ticket.model.blob
    turn, last = homes.turn_of(ticket), homes.last_of(ticket)
    prints = ticket.fingerprints() if ticket.fingerprints is not None else ()
    held_by = homes.holders(blob, prints) if prints else _NOWHERE
    prospects: list[Prospect] = []
    paces: list[Pace] = []
    for key in able:
        copy = copies[key]
        use = uses.get(key) or copy
        held = turn.held_by(copy) if turn is not None else 0
        served = held_by.get(key[0])
        if served is not None and served[0] == copy.loaded_at and served[1] > held:
            held = served[1]
        held = min(held, tokens)
        pace = speeds.known.get(key) or speeds.pace(fleet.instances[key[0]].spec, ticket.model, fleet.gpus)
        seconds = waiting_seconds(pace, works.get(key, IDLE), tokens - held, output, use.in_flight, now)
        paces.append(pace)
        prospects.append(Prospect(seconds, held, use.in_flight, key[0] != last, use.used_at, key[0]))
    chosen = best(prospects)
    index = prospects.index(chosen)
    key, pace, held = able[index], paces[index], chosen.held_tokens
    fresh = tokens - held
    told = telling(fresh, held, works.get(key, IDLE).prompts_until - now)
    return key, Share(fresh * pace.prompt_seconds, output, told, chosen.in_flight, prints), words_for(prospects, chosen)
