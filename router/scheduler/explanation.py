"""What would become of a ticket if it arrived now: the dispatcher's decisions, asked without being carried out.

The same functions decide as in `dispatcher.py`; this adds the wait, who leaves, and every candidate. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from router.domain.explanation import CandidateReport, Explanation, Leaving, Outcome, ReplicaReport, Verdict
from router.domain.ids import LoadId
from router.domain.model import ModelFacts
from router.domain.request import Ticket
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Demand, Estimate, Snapshot
from router.domain.snapshot_index import replicas_of
from router.scheduler.balancing.replica_choice import choose, free_replicas, serving, suits
from router.scheduler.placement import migration
from router.scheduler.placement.cost import eviction_price, reload_seconds
from router.scheduler.placement.cpu_overflow import OnCpu, serve
from router.scheduler.placement.demand import record_request
from router.scheduler.placement.eviction import price_of
from router.scheduler.placement.placement import Decision, MustWait, NoFit, Placed, PlacementRequest, survey
from router.scheduler.placement.search import (
    coming,
    decide,
    placement_requests,
    replica_request,
    request_behind,
    seek_replica,
)
from router.scheduler.placement_memory import PastPlacement
from router.scheduler.queue.wait_estimate import WaitEstimate, load_seconds
from router.scheduler.queue.wait_queue import WaitQueue, group_of
from router.scheduler.reconcile import warm_models
from router.scheduler.reconcile.residency import describe_wait
from router.scheduler.reconcile.unasked import is_unasked_under_way
from router.scheduler.state import FleetState

Waits = Callable[[Ticket, MustWait | None], WaitEstimate]
"""The estimate of a ticket as if it waited, with the result of its search."""

_PLANNED = LoadId(-1)
"""Stands for the load that would be planned."""


def explain(
    fleet: FleetState, queue: WaitQueue, estimate: Estimate, waits: Waits, ticket: Ticket, now: float
) -> Explanation:
    """The decision on a ticket that no queue holds, with a priority that includes its model's."""
    snapshot = _without_unasked(_with_arrival(fleet.snapshot(now), ticket), ticket)
    there = coming(snapshot, ticket.model.blob)
    replicas = tuple(_replica_report(snapshot, r, ticket) for r in replicas_of(snapshot, ticket.model.blob))
    key = group_of(ticket)
    ahead = list(queue.group(key)) if queue.has_group(key) else []
    if not ahead:
        free, count = free_replicas(fleet, ticket.model.blob)
        able = serving(fleet, free, ticket)
        if able:
            return replace(_served(fleet, snapshot, able, count, ticket, now), replicas=replicas)
    if len(queue.tickets) >= snapshot.policy.queue_limit:
        words = f"the queue is full (queue.limit={snapshot.policy.queue_limit})"
        return Explanation(Outcome.REFUSE, words, error_code="queue_full", replicas=replicas)
    if not there and warm_models.awaits_discovery(fleet, ticket.model, now):
        return Explanation(Outcome.WAIT, "waits until the models to be kept warm are found", replicas=replicas)
    suitable = [r for r in there if suits(snapshot, r, ticket)]
    if suitable:
        found = _with_replicas(snapshot, estimate, waits, [*ahead, ticket], suitable)
    else:
        unserved = [t for t in (*ahead, ticket) if not any(suits(snapshot, r, t) for r in there)]
        found = _without_replica(snapshot, estimate, waits, unserved)
    on_cpu = serve(snapshot, ticket, found.expected_wait_seconds) if found.outcome is not Outcome.REFUSE else None
    if on_cpu is not None:
        return _on_cpu(snapshot, on_cpu, found, replicas)
    return replace(found, replicas=replicas)


def _on_cpu(
    snapshot: Snapshot, on_cpu: OnCpu, otherwise: Explanation, replicas: tuple[ReplicaReport, ...]
) -> Explanation:
    """It is served on the CPU, instead of what would become of it on the GPUs."""
    options = snapshot.residencies[on_cpu.key].options
    words = f"{on_cpu.reason}; otherwise: {otherwise.reason}"
    return Explanation(
        Outcome.SERVE,
        words,
        on_cpu.key[0],
        options=options,
        expected_wait_seconds=0.0,
        replicas=replicas,
        candidates=otherwise.candidates,
    )


def _with_arrival(snapshot: Snapshot, ticket: Ticket) -> Snapshot:
    """The snapshot in which the ticket waits and counts as demand."""
    blob, half_life = ticket.model.blob, snapshot.policy.constants.demand_half_life_seconds
    before = snapshot.demand.get(blob) or Demand(at=snapshot.now)
    return replace(
        snapshot,
        demand={**snapshot.demand, blob: record_request(before, snapshot.now, half_life)},
        wanted={**snapshot.wanted, blob: snapshot.wanted.get(blob, 0) + 1},
    )


def _without_unasked(snapshot: Snapshot, ticket: Ticket) -> Snapshot:
    """The snapshot in which loads that nobody waits for have given way, as in `reconcile/unasked.py`."""
    unasked = [r for r in snapshot.reservations.values() if is_unasked_under_way(r)]
    if not unasked or coming(snapshot, ticket.model.blob):
        return snapshot
    residencies, reservations = dict(snapshot.residencies), dict(snapshot.reservations)
    for reservation in unasked:
        key = (reservation.instance, reservation.blob)
        residency = residencies.get(key)
        if residency is not None and residency.state is ResidencyState.LOADING:
            residencies[key] = replace(residency, state=ResidencyState.UNLOADING)
            reservations[reservation.load_id] = replace(reservation, aborted_at=snapshot.now)
        else:
            residencies.pop(key, None)
            del reservations[reservation.load_id]
    return replace(snapshot, residencies=residencies, reservations=reservations)


def _served(
    fleet: FleetState, snapshot: Snapshot, able: Sequence[ResidencyKey], count: int, ticket: Ticket, now: float
) -> Explanation:
    at, words = 0, ""
    if count > 1:
        choice = choose(fleet, able, ticket, now)[1]
        at, words = choice.chosen, choice.explain()
    replica = snapshot.residencies[able[at]]
    return Explanation(
        Outcome.SERVE,
        f"{replica.in_flight} of {replica.slots} slots are in use{words}; loaded there because: {replica.reason}",
        replica.instance,
        snapshot.instances[replica.instance].spec.gpus,
        replica.options,
        expected_wait_seconds=0.0,
    )


def _with_replicas(
    snapshot: Snapshot, estimate: Estimate, waits: Waits, tickets: Sequence[Ticket], serving: Sequence[Residency]
) -> Explanation:
    """It waits for a slot of these, or a further replica is loaded."""
    ticket = tickets[-1]
    request = replica_request(snapshot, tickets, serving)
    reports = survey(snapshot, estimate, request) if request is not None else []
    placed = seek_replica(snapshot, estimate, tickets, serving, request) if request is not None else None
    wait = waits(ticket, None)
    if placed is not None:
        candidates = tuple(_with_chosen(snapshot, reports, placed, ticket.model))
        found = _loaded(snapshot, estimate, placed, ticket.model, candidates)
        known = [each for each in (found.expected_wait_seconds, wait.expected_wait_seconds) if each is not None]
        return replace(found, position=wait.position, expected_wait_seconds=min(known, default=None))
    return Explanation(
        Outcome.WAIT,
        describe_wait(serving),
        serving[0].instance if len(serving) == 1 else None,
        options=serving[0].options,
        position=wait.position,
        expected_wait_seconds=wait.expected_wait_seconds,
        candidates=tuple(reports),
    )


def _without_replica(snapshot: Snapshot, estimate: Estimate, waits: Waits, tickets: Sequence[Ticket]) -> Explanation:
    """A place is searched for it and for the tickets that wait with it."""
    decision = decide(snapshot, estimate, tickets)
    request = request_behind(decision, placement_requests(snapshot, tickets))
    candidates = tuple(_with_chosen(snapshot, survey(snapshot, estimate, request), decision, request.model))
    match decision:
        case Placed():
            found = _loaded(snapshot, estimate, decision, tickets[-1].model, candidates)
        case MustWait():
            wait = waits(tickets[-1], decision)
            found = Explanation(
                Outcome.WAIT,
                decision.reason,
                options=request.options,
                position=wait.position,
                expected_wait_seconds=wait.expected_wait_seconds,
                leaving=tuple(_leaving(snapshot, (*decision.drain, *decision.too_dear))),
                candidates=candidates,
            )
        case NoFit():
            found = Explanation(Outcome.REFUSE, decision.message, error_code=decision.code, candidates=candidates)
    return replace(found, worth_seconds=_limit(request))


def explain_placement(past: PastPlacement, estimate: Estimate) -> Explanation:
    """A past placement with what else was possible then; bytes by what is known now."""
    reports = survey(past.snapshot, estimate, past.request)
    candidates = tuple(_with_chosen(past.snapshot, reports, past.decision, past.model))
    found = _loaded(past.snapshot, estimate, past.decision, past.model, candidates)
    return replace(found, worth_seconds=_limit(past.request))


def _limit(request: PlacementRequest) -> float | None:
    return None if request.price_max == float("inf") else request.price_max


def _with_chosen(
    snapshot: Snapshot, reports: Sequence[CandidateReport], decision: Decision, model: ModelFacts
) -> Iterator[CandidateReport]:
    """The reports, with the chosen candidate first; one that is tuned otherwise, as with fewer slots, is added."""
    if not isinstance(decision, Placed):
        yield from reports
        return
    own = next((report for report in reports if report.instance == decision.instance), None)
    gpus, sizes = tuple(gpu for gpu, _ in decision.per_gpu_bytes), tuple(size for _, size in decision.per_gpu_bytes)
    if own is None or own.per_gpu_bytes != sizes:
        verdict = Verdict.EVICT if decision.evict else Verdict.FREE
        reason = decision.reason.removeprefix(f"{decision.instance}: ")
        price = price_of(snapshot, decision.evict)
        spec = decision.start or snapshot.instances[decision.instance].spec
        slots = snapshot.engines[spec.engine].slots(model, spec)
        own = CandidateReport(
            decision.instance, gpus, verdict, reason, decision.start is not None, sizes, decision.evict, price, slots
        )
    yield own
    yield from (report for report in reports if report.instance != own.instance)


def _loaded(
    snapshot: Snapshot,
    estimate: Estimate,
    placed: Placed,
    model: ModelFacts,
    candidates: tuple[CandidateReport, ...],
) -> Explanation:
    planned = Reservation(_PLANNED, placed.instance, model.blob, placed.per_gpu_bytes, snapshot.now, evict=placed.evict)
    after = replace(snapshot, reservations={**snapshot.reservations, _PLANNED: planned})
    return Explanation(
        Outcome.LOAD,
        placed.reason,
        placed.instance,
        tuple(gpu for gpu, _ in placed.per_gpu_bytes),
        placed.options,
        expected_wait_seconds=load_seconds(snapshot, model, placed.evict),
        load_seconds=reload_seconds(snapshot, model),
        leaving=tuple(_moving(after, estimate, placed.evict)),
        candidates=candidates,
    )


def _leaving(snapshot: Snapshot, keys: Sequence[ResidencyKey]) -> Iterator[Leaving]:
    for key in keys:
        residency = snapshot.residencies.get(key)
        if residency is not None:
            price = eviction_price(snapshot, residency)
            yield Leaving(residency.name, residency.instance, residency.blob, residency.in_flight, price)


def _moving(planned: Snapshot, estimate: Estimate, keys: Sequence[ResidencyKey]) -> Iterator[Leaving]:
    """The models that leave, with the places where they would be loaded meanwhile; `planned`: with the load's room."""
    for leaving in _leaving(planned, keys):
        elsewhere = migration.elsewhere(planned, estimate, (leaving.instance, leaving.blob))
        yield leaving if elsewhere is None else replace(leaving, moves_to=elsewhere.instance)


def _replica_report(snapshot: Snapshot, replica: Residency, ticket: Ticket) -> ReplicaReport:
    return ReplicaReport(
        replica.instance,
        replica.state.value,
        replica.in_flight,
        replica.slots,
        replica.context_length,
        suits(snapshot, replica, ticket),
    )
