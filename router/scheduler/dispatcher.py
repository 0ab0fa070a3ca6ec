"""The scheduler's state machine: `handle(event, now) -> actions`.

Theory of operation
-------------------
Each event changes the state in two steps. First it is *applied*: facts are replaced (a GPU reading, an instance's
state, a finished load), a ticket joins the queue, or a slot becomes free. Then the queue is *pumped*:

1. Plans advance (`reconcile/reservations.py`): idle models that have to leave are unloaded, and loads whose room is
   free are sent.
2. Waiting tickets are handled in groups that one replica could serve. While a loaded replica has a free slot, the
   fairest ticket (`queue/fair_share.py`) is granted on the best replica (`balancing/replica_scorer.py`).
3. For tickets that no loaded or coming replica serves, a place is chosen (`placement/placement.py`) and a plan begins.
   For tickets that would wait longer for a slot than a load takes, a further replica may be planned.
4. Models to be kept warm are planned where they are missing. Instances that were started on demand and have been empty
   for `instance_idle_seconds` are stopped.

A reservation is dropped only when a GPU reading newer than the end of the load shows the memory as used, and an
unloaded model is forgotten only when a newer reading shows it gone: no byte is counted twice or missed. Models that a
server lists and the router did not load are adopted; models that it no longer lists are forgotten.

The rules of an engine (sizes, options, slots) come from `Snapshot.engines`; the scheduler knows no engine by name.

Each ticket ends in exactly one of Grant, Reject or `Cancelled`. No clock and no randomness: the same events give the
same actions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import assert_never

from router.domain.actions import Action, Reject, Remember, Unload, UnloadCause
from router.domain.events import (
    Arrived,
    Cancelled,
    DrainRequested,
    Event,
    FootprintsLoaded,
    GpusRead,
    InstanceChanged,
    LoadFailed,
    LoadFinished,
    LoadMeasured,
    ModelDiscovered,
    PolicyChanged,
    Released,
    ResidencyRead,
    RestartRequested,
    ShutdownBegan,
    Ticked,
    UnloadFinished,
    UnloadRequested,
)
from router.domain.explanation import Explanation, Outcome
from router.domain.ids import LoadIds
from router.domain.instance import InstanceName
from router.domain.model import BlobDigest
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Engines, Snapshot
from router.domain.snapshot_index import promised
from router.scheduler import fast_path
from router.scheduler.balancing.replica_choice import free_replicas, grant, serving, suits
from router.scheduler.explanation import explain, explain_placement
from router.scheduler.placement import migration
from router.scheduler.placement.cpu_overflow import free_copy, serve
from router.scheduler.placement.explain import explain_drained
from router.scheduler.placement.footprint_prediction import FootprintPredictor
from router.scheduler.placement.placement import MustWait, NoFit, Placed
from router.scheduler.placement.search import (
    coming,
    decide,
    placement_requests,
    replica_request,
    request_behind,
    seek_replica,
)
from router.scheduler.placement_memory import PlacementMemory
from router.scheduler.queue.retry_gate import RETRY_SECONDS, RetryGate, concerned, next_attempt
from router.scheduler.queue.timers import can_expire, next_wake
from router.scheduler.queue.wait_estimate import QueueLine, WaitEstimate, wait_estimates
from router.scheduler.queue.wait_queue import GroupKey, WaitQueue, group_of
from router.scheduler.reconcile import (
    cpu_copies,
    drains,
    ejection,
    gpu_health,
    housekeeping,
    later_spills,
    load_outcomes,
    lost_gpus,
    overcounted,
    reservations,
    rolling_restart,
    silence,
    stuck_unloads,
    unasked,
    warm_models,
)
from router.scheduler.reconcile import residency as rules
from router.scheduler.state import FleetState

_CLOSING = "the router is shutting down"
_RESTART_SECONDS = 5
"""A server that is down is not back sooner."""


class Dispatcher:
    """Owns the fleet's state. Not thread-safe and not reentrant: one caller, synchronous calls."""

    def __init__(self, policy: Policy, engines: Engines, attempts: RetryGate | None = None) -> None:
        """`engines`: the rules of the engines in use, by kind. `attempts`: says which groups are tried again; with one
        that is never quiescent the whole queue is tried at each event, and the same is decided."""
        self._fleet = FleetState(policy, engines)
        self._estimate = FootprintPredictor(self._fleet.footprints)
        self._queue = WaitQueue()
        self._loads = LoadIds()
        self._placements = PlacementMemory()
        self._closing = False
        self._reasons: dict[TicketId, str] = {}
        self._retry_gate = attempts or RetryGate()
        self._replacing: dict[GroupKey, Residency] = {}
        """Busy replicas to be replaced by one of the same weights with other options."""
        self._wake_hint = float("inf")

    # --- what others may read ------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        return self._fleet.snapshot(now)

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        """Waiting tickets, oldest first, each with what it waits for."""
        reasons: dict[GroupKey, str] = {}
        waiting: list[tuple[Ticket, str]] = []
        for ticket in self._queue.tickets.values():
            key = group_of(ticket)  # one that came since its group last searched waits for what the others wait for
            reason = reasons[key] = self._reasons.get(ticket.id) or reasons.get(key) or "its turn"
            waiting.append((ticket, reason))
        return tuple(waiting)

    def wait_estimates(self, now: float) -> dict[TicketId, WaitEstimate]:
        """The wait estimate of each ticket, in the order in which groups, and tickets within them, are served."""
        return wait_estimates(self._fleet.snapshot(now), self._queue_lines(now), self._reasons)

    def explain(self, ticket: Ticket, now: float) -> Explanation:
        """What would become of the ticket if it arrived now. Decides as `handle` would, and changes nothing."""
        ticket = self._prioritised(ticket)
        if self._closing:
            return Explanation(Outcome.REFUSE, _CLOSING, error_code="shutting_down")
        estimates = partial(self._wait_with, now=now)
        return explain(self._fleet, self._queue, self._estimate, estimates, ticket, now)

    def explain_placement(self, ticket_id: TicketId) -> tuple[Explanation, Snapshot] | None:
        """Where the ticket's model was loaded for it and what else was possible then, with the facts of that time.

        None if no load was planned for it, or that is forgotten.
        """
        past = self._placements.find(ticket_id)
        return None if past is None else (explain_placement(past, self._estimate), past.snapshot)

    def _queue_lines(self, now: float) -> list[QueueLine]:
        queue, order_of, held = self._queue, self._fleet.counters.order_of, self._retry_gate.held
        fairness = self._fairness()
        return [QueueLine(order_of(queue.group(key), now, *fairness), held(key)) for key in queue.groups()]

    def _fairness(self) -> tuple[float, frozenset[str]]:
        """After how many seconds a request starves, and the clients with most requests in the queue."""
        return self._fleet.policy.starving_after_seconds, self._queue.greedy_clients()

    def _wait_with(self, ticket: Ticket, held: MustWait | None, now: float) -> WaitEstimate:
        """The estimate of a ticket that is not in the queue, as if it waited."""
        key, queue, order_of = group_of(ticket), self._queue, self._fleet.counters.order_of
        lines = self._queue_lines(now)
        keys = list(queue.groups())
        own = QueueLine(order_of([*queue.group(key), ticket], now, *self._fairness()), held)
        if key in keys:
            lines[keys.index(key)] = own
        else:
            behind = (at for at, line in enumerate(lines) if line.tickets[0].priority < ticket.priority)
            lines.insert(next(behind, len(lines)), own)
        return wait_estimates(self._fleet.snapshot(now), lines, {})[ticket.id]

    def running(self) -> list[tuple[InstanceName, float]]:
        """Instance and time of the grant of each request that holds a slot."""
        return [(lease.key[0], lease.granted_at) for lease in self._fleet.leases.values()]

    def fair_share_spread(self) -> float:
        """Most minus fewest weighted tokens that waiting clients have received; 0.0 while fewer than two wait."""
        given = [self._fleet.counters.given(client) for client in self._queue.clients()]
        return max(given) - min(given) if given else 0.0

    @property
    def is_closing(self) -> bool:
        return self._closing

    def next_wake(self) -> float | None:
        """When `Ticked` is next due, or None while only events can change anything."""
        if self._fleet.wake is None:
            self._fleet.wake = (next_wake(self._fleet, self._queue, self._wake_hint),)
        return self._fleet.wake[0]

    # --- events --------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Applies one event and returns what is to be done, in order."""
        if not (self._queue.tickets or self._closing):
            at_once = fast_path.handle(self._fleet, event, now)
            if at_once is not None:
                return at_once
        fleet = self._fleet
        is_excluded = self._replacing or self._closing or fleet.restarts_due or unasked.is_under_way(fleet)
        is_quiescent = not is_excluded and self._retry_gate.is_quiescent(fleet, self._queue, now)
        version, blobs = self._fleet.version, concerned(self._fleet, event) if is_quiescent else None
        self._fleet.wake = None
        self._wake_hint = now + RETRY_SECONDS
        self._fleet.forget_failures(now)
        actions = self._apply(event, now)
        if blobs is not None and version == self._fleet.version:
            actions += self._serve_those(blobs, now)
        else:
            actions += self._expire(now)
            if not (self._closing or isinstance(event, Arrived | Released | Cancelled | ResidencyRead)):
                actions += warm_models.begin_loads(self._fleet, self._estimate, self._loads.next, now)
            actions += self._pump(now, may_retry=isinstance(event, Ticked | GpusRead | ModelDiscovered))
            self._retry_gate.all_attempted(self._queue.unsorted(), self._fleet.version)
        return actions

    def _apply(self, event: Event, now: float) -> list[Action]:
        match event:
            case GpusRead():
                self._fleet.read(event.gpus, event.read_at, event.host_free_bytes)
                measured: list[Action] = [Remember(found) for found in self._fleet.settle()]
                measured += overcounted.correct(self._fleet)
                return [*measured, *gpu_health.observe(self._fleet, now), *self._mark_instances(now)]
            case FootprintsLoaded() | LoadMeasured():
                self._apply_footprints(event)
            case InstanceChanged():
                load_outcomes.instance_changed(self._fleet, event, now)
                return [*rolling_restart.instance_changed(self._fleet, event), *self._mark_instances(now)]
            case ResidencyRead():
                found = rules.reconcile(self._fleet, event, self._estimate, now)
                later_spills.mark(self._fleet, event.instance, now)
                return found
            case ModelDiscovered():
                fleet = self._fleet
                fleet.models[event.model.blob] = fleet.warm_models[event.model.name] = event.model
                fleet.version += 1
            case Ticked():
                pass
            case DrainRequested() | RestartRequested() | PolicyChanged():
                return self._apply_command(event, now)
            case ShutdownBegan():
                self._closing = True
                waiting = list(self._queue.tickets.values())
                return [self._reject(ticket, "shutting_down", _CLOSING) for ticket in waiting]
            case Arrived() | Cancelled() | Released():
                return self._apply_to_requests(event, now)
            case LoadFinished() | LoadFailed():
                return self._apply_load_end(event, now)
            case UnloadFinished() | UnloadRequested():
                return load_outcomes.apply_to_loads(self._fleet, event, now)
            case _:
                assert_never(event)
        return []

    def _apply_footprints(self, event: FootprintsLoaded | LoadMeasured) -> None:
        if isinstance(event, LoadMeasured):
            self._fleet.load_measured(event)
            return
        for found in event.footprints:
            self._fleet.footprints.remember(found)

    def _apply_load_end(self, event: LoadFinished | LoadFailed, now: float) -> list[Action]:
        residency = self._fleet.by_load(event.load_id)
        if self._fleet.overflow:
            cpu_copies.load_ended(self._fleet, event)
        view = self._fleet.instances.get(residency.instance) if residency is not None else None
        actions = load_outcomes.apply_to_loads(self._fleet, event, now)
        if view is None or not self._fleet.probation:
            return actions
        if isinstance(event, LoadFailed) and event.is_memory_short:
            return actions
        actions += gpu_health.load_ended(self._fleet, view.spec.gpus, now, succeeded=isinstance(event, LoadFinished))
        return [*actions, *self._mark_instances(now)]

    def _apply_command(self, event: DrainRequested | RestartRequested | PolicyChanged, now: float) -> list[Action]:
        match event:
            case DrainRequested():
                if event.is_resumed and event.target.instance is None:
                    gpu_health.forgive(self._fleet, event.target.gpu, now)
                return [*drains.change(self._fleet, event), *self._mark_instances(now)]
            case RestartRequested():
                return rolling_restart.request(self._fleet, event)
            case PolicyChanged():
                self._fleet.set_policy(event.policy)
                return []

    def _mark_instances(self, now: float) -> list[Action]:
        """Takes instances out of service whose GPUs are lost or that are drained, and brings others back."""
        drains.bring_back(self._fleet)
        actions = lost_gpus.mark_instances(self._fleet, now)
        drains.take_out(self._fleet, now)
        return actions

    def _apply_to_requests(self, event: Arrived | Cancelled | Released, now: float) -> list[Action]:
        match event:
            case Arrived():
                return self._arrived(event.ticket, now)
            case Cancelled():
                self._queue.remove(event.ticket_id)
                self._reasons.pop(event.ticket_id, None)
                return []
            case Released():
                return self._released(event, now)

    def _arrived(self, ticket: Ticket, now: float) -> list[Action]:
        if self._closing:
            return [Reject(ticket.id, "shutting_down", _CLOSING, retry_after_seconds=5)]
        if self._queue.tickets and not (self._queue.has_client(ticket.client) or ticket.client in self._fleet.clients):
            self._fleet.counters.arrived(ticket.client, self._queue.clients() | self._fleet.clients.keys())
        self._fleet.record_request(ticket, now)
        ticket = self._prioritised(ticket)
        if len(self._queue.tickets) < self._fleet.policy.queue_limit:
            self._queue.add(ticket)
            return []
        if not self._queue.has_group(group_of(ticket)):  # nobody is overtaken
            free, replicas = free_replicas(self._fleet, ticket.model.blob)
            if able := serving(self._fleet, free, ticket):
                return [grant(self._fleet, able, replicas, ticket, now)]
        message = f"server busy: the queue is full (queue.limit={self._fleet.policy.queue_limit})"
        shed = self._queue.shed_for(ticket)
        if shed is None:
            return [self._reject(ticket, "queue_full", message)]
        message += ", and a request of higher priority, or of a client with fewer in it, took this place"
        rejected = self._reject(shed, "queue_full", message)
        self._queue.add(ticket)
        self._fleet.version += 1  # what was begun for the other may be given up
        return [rejected]

    def _prioritised(self, ticket: Ticket) -> Ticket:
        """With its model's priority added to its own."""
        pin = self._fleet.policy.pins.get(ticket.model.name)
        return replace(ticket, priority=ticket.priority + pin.priority) if pin is not None and pin.priority else ticket

    def _retry_after(self) -> int:
        """Seconds: one for each round of the slots there are, within a minute."""
        slots = sum(r.slots for r in self._fleet.residencies.values()) or 1
        return max(1, min(60, len(self._queue.tickets) // slots))

    def _released(self, event: Released, now: float) -> list[Action]:
        lease = self._fleet.leases.get(event.ticket_id)
        replica = self._fleet.release(event, now)
        if lease is not None and lease.key[0] in self._fleet.overflow:
            cpu_copies.answered(self._fleet, lease, event, now)
        self._fleet.version += bool(self._replacing)
        actions = ejection.observe(self._fleet, event, lease.key, now) if lease is not None else []
        if replica is None or replica.state is not ResidencyState.READY:
            return actions
        if event.runner_lost or (event.silent_seconds and silence.hangs(self._fleet, replica, event, now)):
            # The server still lists it, and would load it again inside the next request: unload it properly.
            unload_key = (replica.instance, replica.blob)
            actions.append(rules.unload(self._fleet, unload_key, "its runner died or hangs", UnloadCause.RUNNER_LOST))
        return actions

    # --- time ----------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for ticket in self._queue.expired(now):
            waited, why = now - ticket.arrived_at, self._reasons.get(ticket.id, "its turn")
            message = f"waited {waited:.0f} s (queue.timeout_seconds) for model '{ticket.model.name}': {why}"
            actions.append(self._reject(ticket, "wait_timeout", message))
        # What is promised to a plan leaves for it, whichever path an event takes.
        leaving = promised(self._fleet.snapshot(now)) if self._fleet.reservations else frozenset[ResidencyKey]()
        for key, residency in list(self._fleet.residencies.items()):
            if residency.expires_at is None or residency.expires_at > now:
                continue
            again = residency.state is ResidencyState.UNLOADING
            if (again or key not in leaving) and can_expire(residency, self._queue):
                why = "an unload before this one failed" if again else "its keep_alive ended"
                cause = UnloadCause.OTHER if again else UnloadCause.EXPIRED
                if key[0] not in self._fleet.overflow:
                    self._fleet.dismissed.add(residency.blob)
                actions.append(rules.unload(self._fleet, key, why, cause))
        return actions

    # --- the queue -----------------------------------------------------------------------------------------

    def _pump(self, now: float, may_retry: bool) -> list[Action]:
        self._fleet.set_wanted(self._queue.wanted())
        if self._fleet.reservations:
            for residency in housekeeping.abandoned(self._fleet.snapshot(now)):
                reservations.drop(self._fleet, residency)
        actions = unasked.give_way(self._fleet, now) if self._fleet.reservations else list[Action]()
        actions += reservations.advance(self._fleet, now) + drains.unload_idle(self._fleet)
        actions += later_spills.unload_idle(self._fleet)
        if not self._closing:
            actions += rolling_restart.advance(self._fleet, self._estimate, self._loads.next, now)
        actions += stuck_unloads.restart_drained(self._fleet, now)
        self._mark_leaving(now)
        actions += self._serve_groups(self._queue.groups(), now)
        if may_retry:
            actions += self._keep(now)
        return actions + reservations.advance(self._fleet, now)

    def _mark_leaving(self, now: float) -> None:
        """Which replicas take no new request: those that leave, and those that are ejected."""
        ejected = ejection.apply(self._fleet, now) | self._fleet.spilled
        self._fleet.set_draining(promised(self._fleet.snapshot(now)) | self._being_replaced() | ejected)

    def _serve_groups(self, keys: Iterable[GroupKey], now: float) -> list[Action]:
        """Grants or places each of these groups in turn, from one snapshot until something changes."""
        actions: list[Action] = []
        facts: Snapshot | None = None
        for key in self._fairest_first(list(keys), now):
            version, draining = self._fleet.version, self._fleet.draining
            done = self._grant_group(key, now)
            if done:
                facts = None
            if self._queue.has_group(key) and self._retry_gate.is_due(key, version, now):
                facts = facts or self._fleet.snapshot(now)
                done += self._make_place(facts, key, now)
            if self._fleet.policy.cpu is not None and self._queue.has_group(key):
                done += self._serve_on_cpu(key, now)
            if done or version != self._fleet.version or draining is not self._fleet.draining:
                facts = None
            actions += done
        return actions

    def _fairest_first(self, keys: list[GroupKey], now: float) -> list[GroupKey]:
        """The groups in their order, but of those that wait for the same weights the one with the fairest ticket first.

        They compete for the same slots, and a client must not gain by asking in another way than others.
        """
        by_blob: dict[BlobDigest, list[GroupKey]] = {}
        for key in keys:
            by_blob.setdefault(key.blob, []).append(key)
        if len(by_blob) == len(keys):
            return keys
        fairness = self._fairness()
        for alike in by_blob.values():
            if len(alike) > 1:
                tickets = sorted((t for key in alike for t in self._queue.group(key)), key=lambda t: t.id)
                first = group_of(self._fleet.counters.next_of(tickets, now, *fairness))
                alike.sort(key=lambda key: key != first)
        following = {blob: iter(alike) for blob, alike in by_blob.items()}
        return [next(following[key.blob]) for key in keys]

    def _serve_those(self, blobs: Collection[BlobDigest], now: float) -> list[Action]:
        """Does what `_expire` and `_pump` would do while the queue is quiescent, for tickets of these weights only."""
        keys = self._queue.groups(blobs)
        version = self._fleet.version
        actions: list[Action] = []
        if keys:
            self._fleet.set_wanted(self._queue.wanted())
            actions += self._serve_groups(keys, now)
            self._retry_gate.attempted(filter(self._queue.has_group, keys), self._fleet.version)
        if version != self._fleet.version:
            return actions + reservations.advance(self._fleet, now)
        if self._fleet.has_drained(blobs):
            # Its room was promised: that it leaves changes nothing for all others.
            leaves = reservations.advance(self._fleet, now)
            if self._fleet.version == version + len(leaves) and all(isinstance(each, Unload) for each in leaves):
                self._retry_gate.ignore_change(version, self._fleet.version)
            actions += leaves
        return actions

    def _being_replaced(self) -> frozenset[ResidencyKey]:
        """Busy replicas that a waiting ticket replaces by one of the same weights with other options."""
        queue, fleet = self._queue, self._fleet
        self._replacing = {
            k: replica for k, replica in self._replacing.items() if queue.has_group(k) and fleet.has_still(replica)
        }
        return frozenset((replica.instance, replica.blob) for replica in self._replacing.values())

    def _grant_group(self, key: GroupKey, now: float) -> list[Action]:
        actions: list[Action] = []
        alike = key.options is not None  # what serves one of them serves all
        while waiting := self._queue.group(key):
            free, replicas = free_replicas(self._fleet, key.blob)
            if not free:
                break
            tried = ((t, serving(self._fleet, free, t)) for t in waiting[: 1 if alike else None])
            served = {ticket.id: able for ticket, able in tried if able}
            if not served:
                break
            able_to = waiting if alike else [t for t in waiting if t.id in served]
            ticket = able_to[0]
            if len(able_to) > 1:
                ticket = self._fleet.counters.next_of(able_to, now, *self._fairness())
            if len(waiting) > 1:
                self._fleet.counters.served_before_others(ticket, now)
            able = next(iter(served.values())) if alike else served[ticket.id]
            self._queue.remove(ticket.id)
            self._reasons.pop(ticket.id, None)
            actions.append(grant(self._fleet, able, replicas, ticket, now))
        return actions

    def _serve_on_cpu(self, key: GroupKey, now: float) -> list[Action]:
        """Grants a slot on the CPU to one of those for whom the GPUs would be late."""
        snapshot = self._fleet.snapshot(now)
        if free_copy(snapshot, key.blob) is None:
            return []
        estimates = self.wait_estimates(now)
        for ticket in self._queue.group(key):
            found = serve(snapshot, ticket, estimates[ticket.id].expected_wait_seconds)
            if found is not None:
                self._queue.remove(ticket.id)
                self._reasons.pop(ticket.id, None)
                self._fleet.version += 1  # what was begun for it may be given up
                return [cpu_copies.grant(self._fleet, ticket, found, now)]
        return []

    def _make_place(self, snapshot: Snapshot, key: GroupKey, now: float) -> list[Action]:
        """Plans a load of the group's model; where a replica is loaded or coming, perhaps a further one."""
        waiting, there = self._queue.group(key), coming(snapshot, key.blob)
        if not there and warm_models.awaits_discovery(self._fleet, waiting[0].model, now):
            self._explain(waiting, "waits until the models to be kept warm are found")
            self._retry_gate.failed(key, self._fleet.version, now + RETRY_SECONDS)
            return []
        unserved = [t for t in waiting if not any(suits(snapshot, r, t) for r in there)]
        if unserved:
            decision = decide(snapshot, self._estimate, unserved)
            if isinstance(decision, Placed):
                request = request_behind(decision, placement_requests(snapshot, unserved))
                self._placements.remember(snapshot, unserved, request, decision)
            return self._act_on(key, unserved, decision, now)
        replicas = [r for r in there if suits(snapshot, r, waiting[0])]
        self._explain(waiting, rules.describe_wait(replicas))
        request = replica_request(snapshot, waiting, replicas)
        placed = seek_replica(snapshot, self._estimate, waiting, replicas, request) if request is not None else None
        if request is None or placed is None:
            self._retry_gate.failed(key, self._fleet.version, next_attempt(snapshot, waiting))
            return []
        self._placements.remember(snapshot, waiting, request, placed)
        return reservations.begin(self._fleet, waiting[0].model, placed, self._loads.next(), now)

    def _act_on(
        self, key: GroupKey, tickets: list[Ticket], decision: Placed | MustWait | NoFit, now: float
    ) -> list[Action]:
        match decision:
            case Placed():
                self._explain(tickets, decision.reason)
                if len(decision.per_gpu_bytes) > 1:
                    self._fleet.mark_large(key.blob)
                own = self._fleet.residencies.get((decision.instance, key.blob))
                if own is not None and own.in_flight and own.state is ResidencyState.READY:
                    self._replacing[key] = own
                actions = reservations.begin(self._fleet, tickets[0].model, decision, self._loads.next(), now)
                actions += self._move(decision.evict, now)
                self._mark_leaving(now)
                return actions
            case MustWait():
                snapshot = self._fleet.snapshot(now)
                self._explain(tickets, decision.reason + explain_drained(snapshot))
                self._retry_gate.failed(key, self._fleet.version, next_attempt(snapshot, tickets), decision)
                return []
            case NoFit():
                return [self._reject(t, decision.code, decision.message, decision.status) for t in tickets]

    def _move(self, leaving: Iterable[ResidencyKey], now: float) -> list[Action]:
        """Plans replicas on other GPUs with free room for models that a plan evicts although they are in demand."""
        actions: list[Action] = []
        for key in leaving:
            placed = migration.elsewhere(self._fleet.snapshot(now), self._estimate, key)
            if placed is not None:
                model = self._fleet.residencies[key].model
                actions += reservations.begin(self._fleet, model, placed, self._loads.next(), now)
        return actions

    def _move_off_short_gpus(self, now: float) -> list[Action]:
        """Moves models off GPUs whose memory others have come to use."""
        leaving = list(migration.superfluous(self._fleet.snapshot(now)))
        actions: list[Action] = [rules.unload(self._fleet, key, why, cause) for key, why, cause in leaving]
        found = migration.find_move(self._fleet.snapshot(now), self._estimate)
        if found is not None:
            residency, placed = found
            actions += reservations.begin(self._fleet, residency.model, placed, self._loads.next(), now)
        return actions

    def _keep(self, now: float) -> list[Action]:
        """Housekeeping that no ticket waits for: warm models, and instances that are no longer needed."""
        if self._closing:
            return []
        self._retry_gate.forget_others(self._queue)
        actions: list[Action] = [*housekeeping.stop_empty(self._fleet, now), *self._move_off_short_gpus(now)]
        actions += gpu_health.begin_tests(self._fleet, self._estimate, self._loads.next, now)
        models, dismissed = self._fleet.models, self._fleet.dismissed
        for model, placed in housekeeping.anticipate(self._fleet.snapshot(now), models, dismissed, self._estimate):
            actions += reservations.begin(self._fleet, model, placed, self._loads.next(), now)
        if self._fleet.overflow and not self._fleet.reservations:
            actions += cpu_copies.keep(self._fleet, self._estimate, self._loads.next(), now)
        if self._fleet.policy.rest is not None and not self._fleet.reservations:
            actions += unasked.begin(self._fleet, models, dismissed, self._estimate, self._loads.next(), now)
        return actions

    # --- endings -------------------------------------------------------------------------------------------

    def _explain(self, tickets: Iterable[Ticket], reason: str) -> None:
        for ticket in tickets:
            self._reasons[ticket.id] = reason

    def _reject(self, ticket: Ticket, code: str, message: str, status: int | None = None) -> Reject:
        self._queue.remove(ticket.id)
        self._reasons.pop(ticket.id, None)
        may_retry = code in ("queue_full", "shutting_down", "no_instance", "wait_timeout") or status == 503
        retry = self._retry_after() if may_retry else None
        if code == "no_instance" or status == 503:
            retry = max(_RESTART_SECONDS, retry or 0)
        return Reject(ticket.id, code, message, retry, status)
