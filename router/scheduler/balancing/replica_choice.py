"""Chooses among the copies of a model that can serve now: gathers what is known of each, for `balance` to rank.

Both ways of the dispatcher, the long and the short, choose and grant here. It looks at no queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.actions import Choice, Grant
from router.domain.request import Ticket
from router.domain.residency import ResidencyKey
from router.scheduler.balancing.pending_work import IDLE, Share, expected_output, telling
from router.scheduler.balancing.prefix_affinity import Held
from router.scheduler.balancing.replica_scorer import Prospect, best, waiting_seconds
from router.scheduler.balancing.throughput import Pace
from router.scheduler.state import FleetState

_NOWHERE: Held = {}


def grant(fleet: FleetState, able: Sequence[ResidencyKey], copies: int, ticket: Ticket, now: float) -> Grant:
    """The ticket gets a slot of one of `able`, copies of its model that could each serve it now.

    `copies`: how many there are in all, loaded or on their way. Where it is the only one nothing is weighed or noted.
    """
    if copies > 1:
        share, choice = choose(fleet, able, ticket, now)
        key = able[choice.chosen]
    else:
        key, share, choice = able[0], None, None
    copy = fleet.copies[key]
    used = fleet.take_slot(ticket, key, now, share).in_flight - 1
    url = fleet.instances[key[0]].spec.url
    return Grant(ticket.id, key[0], url, copy.reason, used, copy.slots, choice, copy.options, copy.context_length)


def choose(fleet: FleetState, able: Sequence[ResidencyKey], ticket: Ticket, now: float) -> tuple[Share, Choice]:
    """One of `able`, at least one, with the request's part in its work. Changes nothing."""
    tokens, output = ticket.prompt_tokens, expected_output(ticket)
    copies, uses, works, speeds = fleet.copies, fleet.uses, fleet.works, fleet.speeds
    homes, blob = fleet.homes, ticket.model.blob
    turn, last = homes.turn_of(ticket), homes.last_of(ticket)
    prints = ticket.fingerprints() if ticket.fingerprints is not None else ()
    held_by = homes.holders(blob, prints) if prints else _NOWHERE
    prospects: list[Prospect] = []
    seconds: list[float] = []
    paces: list[Pace] = []
    for key in able:
        copy, instance = copies[key], key[0]
        use = uses.get(key) or copy
        fresh = tokens
        if turn is not None or held_by:
            held = turn.held_by(copy) if turn is not None else 0
            served = held_by.get(instance)
            if served is not None and served[0] == copy.loaded_at and served[1] > held:
                held = served[1]
            fresh = tokens - held if held < tokens else 0
        pace = speeds.known.get(key) or speeds.pace(fleet.instances[instance].spec, ticket.model, fleet.gpus)
        beside = use.in_flight
        seconds.append(waiting_seconds(pace, works.get(key, IDLE), fresh, output, beside, now))
        prospects.append(Prospect(fresh, beside, instance != last, use.used_at, instance))
        paces.append(pace)
    index = best(seconds, prospects)
    key, pace, chosen = able[index], paces[index], prospects[index]
    fresh = chosen.missing_tokens
    told = telling(fresh, tokens - fresh, works.get(key, IDLE).prompts_until - now)
    share = Share(fresh * pace.prompt_seconds, output, told, chosen.in_flight, prints)
    return share, Choice(index, tuple(prospects), tuple(seconds), tokens)
