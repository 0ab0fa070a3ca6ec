"""Which replicas can serve a ticket now, and which of them does: grants it a slot.

Collects the data of each replica for `replica_scorer.py` to rank. Used by both paths of the dispatcher, the full and
the fast one. The queue is not considered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from router.domain.actions import Grant
from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.model import BlobDigest
from router.domain.replica_choice import Choice, Prospect
from router.domain.request import Ticket
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Engines
from router.scheduler.balancing.pending_work import IDLE, WorkShare, expected_output, sample_tokens
from router.scheduler.balancing.prefix_affinity import Held
from router.scheduler.balancing.replica_scorer import best, waiting_seconds
from router.scheduler.balancing.throughput import Throughput
from router.scheduler.reconcile import ejection
from router.scheduler.state import FleetState

_NOWHERE: Held = {}


class Fleet(Protocol):
    """The facts needed in addition to the replicas; both `Snapshot` and `FleetState` have them."""

    @property
    def instances(self) -> Mapping[InstanceName, InstanceView]: ...

    @property
    def draining(self) -> Set[ResidencyKey]: ...

    @property
    def engines(self) -> Engines: ...


def suits(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """Returns True if the replica could serve the ticket without a reload, now or when a slot is free."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and residency.blob == ticket.model.blob
        and _serves_as_requested(snapshot, view, residency, ticket)
    )


def _can_take(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """Returns True if the replica can serve the ticket now, except that all its slots may be in use.

    The replica must have the ticket's weights.
    """
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and view.state is InstanceState.READY
        and residency.state is ResidencyState.READY
        and _serves_as_requested(snapshot, view, residency, ticket)
        and (not snapshot.draining or (residency.instance, residency.blob) not in snapshot.draining)
    )


def _serves_as_requested(snapshot: Fleet, view: InstanceView, residency: Residency, ticket: Ticket) -> bool:
    if ticket.layout is not None and not ticket.layout.allows(view.spec.gpus):
        return False
    if residency.options == ticket.options and not (ticket.takes_default_context and ticket.context_length):
        return True
    if ticket.takes_default_context:
        return snapshot.engines[view.spec.engine].gives_by_default(residency, ticket, view.spec)
    return ticket.is_flexible and snapshot.engines[view.spec.engine].can_adapt(residency, ticket, view.spec)


def free_replicas(fleet: FleetState, blob: BlobDigest) -> tuple[list[ResidencyKey], int]:
    """Replicas of these weights with a free slot, and the number of all their replicas; not those of CPU overflow."""
    free: list[ResidencyKey] = []
    uses, replicas, apart = fleet.uses, 0, fleet.overflow
    for key, replica in fleet.replicas.items():
        if key[1] == blob and not (apart and key[0] in apart):
            replicas += 1
            if (uses.get(key) or replica).in_flight < replica.slots:
                free.append(key)
    return free, replicas


def serving(fleet: FleetState, free: Sequence[ResidencyKey], ticket: Ticket) -> list[ResidencyKey]:
    """The replicas among `free`, which have the ticket's weights, that can serve it now."""
    replicas = fleet.replicas
    if fleet.draining or ticket.layout is not None or (ticket.takes_default_context and ticket.context_length):
        return [key for key in free if _can_take(fleet, replicas[key], ticket)]
    # The ordinary case of `_can_take`, in one loop.
    instances, options = fleet.instances, ticket.options
    able: list[ResidencyKey] = []
    for key in free:
        replica, view = replicas[key], instances.get(key[0])
        is_ready = view is not None and view.state is InstanceState.READY and replica.state is ResidencyState.READY
        if is_ready and (replica.options == options or _can_take(fleet, replica, ticket)):
            able.append(key)
    return able


def grant(fleet: FleetState, able: Sequence[ResidencyKey], replicas: int, ticket: Ticket, now: float) -> Grant:
    """Grants the ticket a slot of one of `able`, the replicas of its model that could serve it now.

    `replicas`: the number of replicas in total, loaded or coming. With a single one nothing is scored or recorded.
    """
    if ticket.avoid is not None:
        able = [key for key in able if key[0] != ticket.avoid] or able
    if fleet.hot_instances:
        able = [key for key in able if key[0] not in fleet.hot_instances] or able
    if replicas > 1:
        share, choice = choose(fleet, able, ticket, now)
        key = able[choice.chosen]
    else:
        key, share, choice = able[0], None, None
    replica = fleet.replicas[key]
    used = fleet.take_slot(ticket, key, now, share).in_flight - 1
    if fleet.health:
        ejection.granted(fleet, key, ticket.id)
    url = fleet.instances[key[0]].spec.url
    return Grant(
        ticket.id, key[0], url, replica.reason, used, replica.slots, choice, replica.options, replica.context_length
    )


def choose(fleet: FleetState, able: Sequence[ResidencyKey], ticket: Ticket, now: float) -> tuple[WorkShare, Choice]:
    """The best of `able` (not empty), and the request's share in its work. Changes nothing."""
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
        missing = tokens
        if turn is not None or held_by:
            cached = turn.held_by(replica) if turn is not None else 0
            match = held_by.get(instance)
            if match is not None and match[0] == replica.loaded_at and match[1] > cached:
                cached = match[1]
            missing = tokens - cached if cached < tokens else 0
        throughput = speeds.known.get(key) or speeds.throughput(
            fleet.instances[instance].spec, ticket.model, fleet.gpus
        )
        concurrent = use.in_flight
        seconds.append(waiting_seconds(throughput, works.get(key, IDLE), missing, output, concurrent, now))
        prospects.append(Prospect(missing, concurrent, instance != last, use.used_at, instance))
        throughputs.append(throughput)
    index = best(seconds, prospects)
    key, throughput, chosen = able[index], throughputs[index], prospects[index]
    missing = chosen.missing_tokens
    samples = sample_tokens(missing, tokens - missing, works.get(key, IDLE).prompts_until - now)
    share = WorkShare(missing * throughput.prompt_seconds, output, samples, chosen.in_flight, prints)
    return share, Choice(index, tuple(prospects), tuple(seconds), tokens)
