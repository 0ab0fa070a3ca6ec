"""Looking for a place on behalf of waiting tickets: which context to load with, how much may be disturbed for them.

Between the queue, which knows who waits for how long, and placement, which knows GPUs. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

from router.domain.engine_rules import EngineRules
from router.domain.instance import InstanceState
from router.domain.model import BlobDigest
from router.domain.policy import Policy
from router.domain.request import RunnerOptions, Ticket
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import replicas_of
from router.scheduler.placement.candidates import widened_context
from router.scheduler.placement.cost import reload_seconds, service_seconds, swap_price, wait_bounds, worth_of_load
from router.scheduler.placement.footprint_prediction import estimate_unmeasured
from router.scheduler.placement.placement import Decision, NoFit, Placed, PlacementRequest, place, would_swap
from router.scheduler.placement.unavailable import explain_taken, taken_by_others, without_others

_REPLICA_PRICE_SHARE = 0.25
"""A further replica may cost others at most this share of its own load time."""


def decide(snapshot: Snapshot, estimate: Estimate, tickets: Sequence[Ticket]) -> Decision:
    """`seek`; where only a safety margin makes the model too large, by the plain estimate.

    A model that only the memory of other programs makes too large may be asked for again: status 503 instead of 422.
    """
    decision = seek(snapshot, estimate, tickets)
    if _is_too_large(decision) and snapshot.policy.constants.unseen_margin_ratio:
        decision = seek(snapshot, estimate_unmeasured, tickets)  # rather a load that fails than a refusal
    if not _is_too_large(decision):
        return decision
    taken = taken_by_others(snapshot)
    if not taken or _is_too_large(seek(without_others(snapshot, taken), estimate, tickets)):
        return decision
    return replace(decision, status=503, message=f"{explain_taken(snapshot, taken)}: {decision.message}")


def _is_too_large(decision: Decision) -> TypeGuard[NoFit]:
    return isinstance(decision, NoFit) and decision.code == "model_too_large"


def request_behind(decision: Decision, requests: Sequence[PlacementRequest]) -> PlacementRequest:
    """Which of `placement_requests` led to the decision, as far as that can be told."""
    if isinstance(decision, Placed):
        return next((each for each in requests if each.options == decision.options), requests[0])
    return requests[0]


def placement_requests(snapshot: Snapshot, tickets: Sequence[Ticket]) -> list[PlacementRequest]:
    """What `seek` tries for tickets that no replica serves, in this order."""
    policy, head = snapshot.policy, tickets[0]
    waited = snapshot.now - min(t.arrived_at for t in tickets)
    request = PlacementRequest(
        head.model,
        layout=head.layout,
        may_drain=waited >= wait_bounds(snapshot, head.model).drain_after_seconds,
        may_evict_young=waited >= policy.ttft_target_seconds,
        price_max=_price_max(snapshot, tickets, waited),
        may_use_fewer_slots=True,
        supersedes=frozenset(
            (r.instance, r.blob)
            for r in replicas_of(snapshot, head.model.blob)
            if head.is_flexible or _is_widened(head)
        ),
    )
    return [
        replace(request, options=options, default_context=_default_context_needed(snapshot, head, options))
        for options in _options_to_try(snapshot, tickets)
    ]


def seek(snapshot: Snapshot, estimate: Estimate, tickets: Sequence[Ticket]) -> Decision:
    """A place for tickets that no replica serves, with the context for all of them, else that of the first."""
    policy, head = snapshot.policy, tickets[0]
    to_try = placement_requests(snapshot, tickets)
    decision: Decision | None = None
    for index, attempt in enumerate(to_try):
        found = place(snapshot, estimate, attempt)
        if isinstance(found, NoFit) and attempt.default_context is not None and not _is_widened(head):
            # No instance gives the pinned context by default. Requests that a replica with it could not serve without
            # a reload get what they ask for.
            is_enough = (attempt.default_context or 0) >= policy.context_length
            options = attempt.options if head.is_flexible and is_enough else head.options
            found = place(snapshot, estimate, replace(attempt, options=options, default_context=None))
        if not isinstance(found, NoFit) or found.code not in ("model_too_large", "no_instance"):
            return _without_swaps(snapshot, estimate, found, to_try[index + 1 :]) or found
        decision = decision or found
    assert decision is not None
    if _is_widened(head):
        return replace(decision, code="model_too_large")  # at once: the request does with the default context
    return decision


def _without_swaps(
    snapshot: Snapshot, estimate: Estimate, found: Decision, smaller: Sequence[PlacementRequest]
) -> Placed | None:
    """Free room with the smaller context, where the larger one has models leave that would drive it out again."""
    if isinstance(found, NoFit) or not (found.evict if isinstance(found, Placed) else found.drain or found.too_dear):
        return None
    for request in smaller:
        instead = place(snapshot, estimate, request)
        if not isinstance(instead, Placed) or instead.evict:
            continue
        stuck = would_swap(snapshot, found, instead)
        if swap_price(snapshot, request.model, stuck) > 0.0:
            names = ", ".join(r.name for r in stuck)
            return replace(instead, reason=f"{instead.reason}; with less context, so that {names} need not leave")
    return None


def _price_max(snapshot: Snapshot, tickets: Sequence[Ticket], waited: float) -> float:
    """What may be lost by others for these tickets: what they gain, and without limit for those that starve."""
    if waited >= wait_bounds(snapshot, tickets[0].model).starving_after_seconds:
        return float("inf")
    return worth_of_load(snapshot, tickets[0].model, tickets)


def _options_to_try(snapshot: Snapshot, tickets: Sequence[Ticket]) -> list[RunnerOptions]:
    """Runner options for the load, the best first.

    Requests that cannot be adapted get exactly theirs. Others get the context of requests that say nothing of it where
    that is enough, so that the next client does not cause a reload, or else the next step up; what was asked for where
    that does not fit.
    """
    policy, head = snapshot.policy, tickets[0]
    default = policy.context_length
    engine = snapshot.engines[head.model.engine]
    pin = snapshot.policy.pins.get(head.model.name)
    if pin is not None and pin.context_length is not None:
        options = engine.default_options(head.model, pin, default)
        if _is_served_with(engine, options, default, tickets):
            return [options]
    if not head.is_flexible and not _is_widened(head):
        return [head.options]
    most = max(_context_needed(engine, default, ticket) for ticket in tickets)
    trained = head.model.context_length
    of_model = engine.default_context_length(head.model, default)
    step = of_model if most <= of_model else _step(policy, most)
    contexts = [min(step, trained) if trained else step]
    if head.is_flexible:
        contexts.append(most)
    return list(dict.fromkeys(engine.options_with_context(head.model, context, default) for context in contexts))


def _is_served_with(
    engine: EngineRules[Snapshot], options: RunnerOptions, default_context_length: int, tickets: Sequence[Ticket]
) -> bool:
    """Whether a replica with the pinned options serves the tickets, so that they do not ask for another at once."""
    head = tickets[0]
    if not head.is_flexible and not head.takes_default_context:
        return head.options == options
    pinned = engine.requested_context(options) or default_context_length
    trained = head.model.context_length or pinned
    named = [engine.requested_context(ticket.options) or ticket.context_length for ticket in tickets]
    return max(min(context, trained) for context in named) <= pinned


def _is_widened(ticket: Ticket) -> bool:
    """Whether it needs more context than a server gives by default, and cannot name it."""
    return ticket.takes_default_context and ticket.context_length > 0


def _default_context_needed(snapshot: Snapshot, ticket: Ticket, options: RunnerOptions) -> int | None:
    """The context that the instance itself must give for a request that cannot name one; None: the usual one."""
    pin = snapshot.policy.pins.get(ticket.model.name)
    if ticket.takes_default_context or (pin is not None and pin.context_length is not None):
        return snapshot.engines[ticket.model.engine].requested_context(options)
    return None


def _context_needed(engine: EngineRules[Snapshot], default_context_length: int, ticket: Ticket) -> int:
    """Tokens of context that the request names or gets by default, cut to the trained context."""
    context = engine.requested_context(ticket.options) or ticket.context_length or default_context_length
    trained = ticket.model.context_length
    return min(context, trained) if trained > 0 else context


def _step(policy: Policy, tokens: int) -> int:
    step = policy.constants.context_step_tokens
    while step < tokens:
        step *= 2
    return step


def seek_replica(
    snapshot: Snapshot,
    estimate: Estimate,
    tickets: Sequence[Ticket],
    replicas: Sequence[Residency],
    request: PlacementRequest,
) -> Placed | None:
    """One more replica for tickets whose wait for a slot would be longer than a load, where room is free or cheap.

    `request`: that of `replica_request` for the same tickets.
    """
    found = place(snapshot, estimate, request)
    if not isinstance(found, Placed):
        return None
    wait, load = _slot_wait_seconds(snapshot, tickets, replicas), reload_seconds(snapshot, tickets[0].model)
    return replace(
        found, reason=f"{found.reason}; a further replica, {wait:.0f} s of waiting against {load:.0f} to load"
    )


def replica_request(
    snapshot: Snapshot, tickets: Sequence[Ticket], replicas: Sequence[Residency]
) -> PlacementRequest | None:
    """What `seek_replica` tries; None where one more replica is not allowed, or not worth its load."""
    policy, head = snapshot.policy, tickets[0]
    pin = snapshot.policy.pins.get(head.model.name)
    most = pin.replicas_max if pin is not None and pin.replicas_max is not None else policy.constants.replicas_max
    if len(replicas) >= most or any(r.state is not ResidencyState.READY for r in replicas):
        return None
    if not all(r.per_gpu_bytes for r in replicas):
        return None  # on the CPU a further replica would share the same cores
    load = reload_seconds(snapshot, head.model)
    if _slot_wait_seconds(snapshot, tickets, replicas) <= load:
        return None
    return PlacementRequest(
        head.model,
        options=replicas[0].options,
        layout=head.layout,
        price_max=load * _REPLICA_PRICE_SHARE,
        default_context=widened_context(snapshot, snapshot.instances[replicas[0].instance].spec),
        not_on=frozenset(r.instance for r in replicas),
    )


def _slot_wait_seconds(snapshot: Snapshot, tickets: Sequence[Ticket], replicas: Sequence[Residency]) -> float:
    """Until the last of the tickets has a slot of these replicas."""
    slots = sum(r.slots for r in replicas)
    return len(tickets) / max(1, slots) * service_seconds(snapshot, replicas[0])


def coming(snapshot: Snapshot, blob: BlobDigest) -> list[Residency]:
    """Of these weights, loaded or on their way, and not about to leave."""
    return [
        r
        for r in replicas_of(snapshot, blob)
        if r.state is not ResidencyState.UNLOADING
        and (r.instance, r.blob) not in snapshot.draining
        and _is_up(snapshot, r)
    ]


def _is_up(snapshot: Snapshot, residency: Residency) -> bool:
    """Whether its instance serves, or is being started for it."""
    view = snapshot.instances.get(residency.instance)
    if view is None:
        return False
    return view.state is InstanceState.READY or (view.spec.on_demand and view.state is InstanceState.STARTING)
