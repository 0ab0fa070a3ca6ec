"""Chooses among the copies of a model that can serve now: gathers what is known of each, for `balance` to rank.

Both ways of the dispatcher, the long and the short, choose and grant here. It looks at no queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.actions import Grant
from router.domain.replica_choice import Choice, Prospect
from router.domain.request import Ticket
from router.domain.residency import ResidencyKey
from router.scheduler.balancing.pending_work import IDLE, WorkShare, expected_output, telling
from router.scheduler.balancing.prefix_affinity import Held
from router.scheduler.balancing.replica_scorer import best, waiting_seconds
from router.scheduler.balancing.throughput import Throughput
from router.scheduler.state import FleetState

_NOWHERE: Held = {}


def grant(fleet: FleetState, able: Sequence[ResidencyKey], replicas: int, ticket: Ticket, now: float) -> Grant:
    """The ticket gets a slot of one of `able`, copies of its model that could each serve it now.

    `copies`: how many there are in all, loaded or on their way. Where it is the only one nothing is weighed or noted.
    """
    if replicas > 1:
        share, choice = choose(fleet, able, ticket, now)
        key = able[choice.chosen]
    else:
        key, share, choice = able[0], None, None
    replica = fleet.replicas[key]
    used = fleet.take_slot(ticket, key, now, share).in_flight - 1
    url = fleet.instances[key[0]].spec.url
    return Grant(
        ticket.id, key[0], url, replica.reason, used, replica.slots, choice, replica.options, replica.context_length
    )


def choose(fleet: FleetState, able: Sequence[ResidencyKey], ticket: Ticket, now: float) -> tuple[WorkShare, Choice]:
    """One of `able`, at least one, with the request's part in its work. Changes nothing."""
    tokens, output = ticket.prompt_tokens, expected_output(ticket)
    replicas, uses, works, speeds = fleet.replicas, fleet.uses, fleet.works, fleet.speeds
    prefix_affinity, blob = fleet.prefix_affinity, ticket.model.blob
    turn, last = prefix_affinity.turn_of(ticket), prefix_affinity.last_of(ticket)
    prints = ticket.fingerprints() if ticket.fingerprints is not None else ()
    held_by = prefix_affinity.holders(blob, prints) if prints else _NOWHERE
    prospects: list[Prospect] = []
    seconds: list[float] = []
    throughputs: list[Throughput] = []
    for key in able:
        replica, instance = replicas[key], key[0]
        use = uses.get(key) or replica
        fresh = tokens
        if turn is not None or held_by:
            held = turn.held_by(replica) if turn is not None else 0
            served = held_by.get(instance)
            if served is not None and served[0] == replica.loaded_at and served[1] > held:
                held = served[1]
            fresh = tokens - held if held < tokens else 0
        throughput = speeds.known.get(key) or speeds.throughput(
            fleet.instances[instance].spec, ticket.model, fleet.gpus
        )
        concurrent = use.in_flight
        seconds.append(waiting_seconds(throughput, works.get(key, IDLE), fresh, output, concurrent, now))
        prospects.append(Prospect(fresh, concurrent, instance != last, use.used_at, instance))
        throughputs.append(throughput)
    index = best(seconds, prospects)
    key, throughput, chosen = able[index], throughputs[index], prospects[index]
    fresh = chosen.missing_tokens
    told = telling(fresh, tokens - fresh, works.get(key, IDLE).prompts_until - now)
    share = WorkShare(fresh * throughput.prompt_seconds, output, told, chosen.in_flight, prints)
    return share, Choice(index, tuple(prospects), tuple(seconds), tokens)
