"""The state machine that ties the deciding functions together: `handle(event, now) -> actions`.

Theory of operation
-------------------
State changes in two steps. First the event is *applied*: facts are replaced (a reading of the cards, an instance's
state, a load's end), a ticket joins the queue or a slot comes back. Then the queue is *pumped*: for each group of
waiting tickets (one weights blob with one set of runner options), oldest group first,

1. tickets are granted while a loaded copy with those options has a free slot;
2. where no copy is loaded or on its way, a place is chosen. Its room is reserved on all its cards at once, and the
   residency stands as PLANNED while what must leave is unloaded. When the cards show the room as free, the one
   `Load` is sent and the residency is LOADING; when the load has ended well it is READY and its tickets are granted;
3. where nothing can be done now the group waits. If it has waited for long, the busy models in its way stop taking
   new requests (they *drain*), so that a stream of small requests cannot starve a large model.

A reservation is dropped only when a reading of the cards newer than the end of the load shows the memory as used, and
an unloaded model is forgotten only when a newer reading shows it gone: no byte is counted twice or not at all.
Whatever a server lists that the router did not load is adopted, and what it no longer lists is forgotten.

Each ticket ends in exactly one of Grant, Reject or `Cancelled`. No clock, no randomness: same events, same actions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from router.core import residency as rules
from router.core import shortway
from router.core.balance import can_serve, pick, suits
from router.core.entities import (
    Failure,
    InstanceState,
    InstanceView,
    Policy,
    Reservation,
    Residency,
    ResidencyKey,
    ResidencyState,
    Snapshot,
    Ticket,
    TicketId,
)
from router.core.events import (
    Action,
    Arrived,
    Cancelled,
    Event,
    GpusRead,
    Grant,
    InstanceChanged,
    LoadFailed,
    LoadFinished,
    Reject,
    Released,
    ResidencyRead,
    ShutdownBegan,
    Ticked,
    UnloadAsked,
    UnloadFinished,
)
from router.core.ids import LoadIds
from router.core.keepalive import merged_keep_alive
from router.core.ledger import slots_of
from router.core.placement import Estimate, MustWait, NoFit, Placed, place
from router.core.state import FleetState, expiry
from router.core.waitqueue import WaitQueue, group_of
from router.core.waking import can_expire, next_wake


class Dispatcher:
    """Owns the fleet's state. Not thread-safe and not reentrant: one caller, synchronous calls."""

    def __init__(self, policy: Policy, estimate: Estimate) -> None:
        self._policy = policy
        self._estimate = estimate
        self._fleet = FleetState(policy)
        self._queue = WaitQueue()
        self._loads = LoadIds()
        self._closing = False
        self._reasons: dict[TicketId, str] = {}
        self._wake_hint = float("inf")

    # --- what others may read ------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        return self._fleet.snapshot(now)

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        """Waiting tickets, oldest first, each with what it waits for."""
        return tuple((ticket, self._reasons.get(ticket.id, "")) for ticket in self._queue)

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
        if not (len(self._queue) or self._closing):
            at_once = shortway.handle(self._fleet, event, now)
            if at_once is not None:
                return at_once
        self._fleet.wake = None
        self._wake_hint = now + 1.0
        self._fleet.forget_failures(now)
        actions = self._apply(event, now)
        actions += self._expire(now)
        actions += self._pump(now)
        return actions

    def _apply(self, event: Event, now: float) -> list[Action]:
        match event:
            case GpusRead():
                self._fleet.gpus = {gpu.uuid: gpu for gpu in event.gpus}
                self._fleet.gpus_read_at = event.read_at
                self._fleet.settle()
            case InstanceChanged():
                self._instance_changed(event)
            case ResidencyRead():
                rules.reconcile(self._fleet, event, self._estimate, now)
            case Ticked():
                pass
            case ShutdownBegan():
                self._closing = True
                return [self._reject(t, "shutting_down", "the router is shutting down") for t in list(self._queue)]
            case Arrived() | Cancelled() | Released():
                return self._apply_to_requests(event, now)
            case LoadFinished() | LoadFailed() | UnloadFinished() | UnloadAsked():
                return self._apply_to_loads(event, now)
            case _:
                assert_never(event)
        return []

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

    def _apply_to_loads(
        self, event: LoadFinished | LoadFailed | UnloadFinished | UnloadAsked, now: float
    ) -> list[Action]:
        match event:
            case LoadFinished():
                return self._load_finished(event, now)
            case LoadFailed():
                self._load_failed(event, now)
            case UnloadFinished():
                self._unload_finished(event, now)
            case UnloadAsked():
                return self._unload_asked(event, now)
        return []

    def _instance_changed(self, event: InstanceChanged) -> None:
        name = event.spec.name
        before = self._fleet.instances.get(name)
        version = event.version or (before.version if before else None)
        self._fleet.instances[name] = InstanceView(event.spec, event.state, version, event.reason)
        if event.state not in (InstanceState.READY, InstanceState.DRAINING):
            self._fleet.forget_instance(name)

    def _arrived(self, ticket: Ticket, now: float) -> list[Action]:
        if self._closing:
            return [Reject(ticket.id, "shutting_down", "the router is shutting down", retry_after_seconds=5)]
        if len(self._queue) < self._policy.queue_limit:
            self._queue.add(ticket)
            return []
        granted = self._grant(self._fleet.snapshot(now), ticket, now) if not self._overtakes(ticket) else None
        if granted is not None:
            return [granted]
        message = f"server busy: {len(self._queue)} requests wait already (queue.limit)"
        return [Reject(ticket.id, "queue_full", message, retry_after_seconds=self._retry_after())]

    def _overtakes(self, ticket: Ticket) -> bool:
        return bool(self._queue.group(group_of(ticket)))

    def _retry_after(self) -> int:
        """Seconds: one for each round of the slots there are, within a minute."""
        slots = sum(r.slots for r in self._fleet.residencies.values()) or 1
        return max(1, min(60, len(self._queue) // slots))

    def _released(self, event: Released, now: float) -> list[Action]:
        key = self._fleet.leases.get(event.ticket_id)
        residency = self._fleet.give_back(event.ticket_id, now)
        if residency is None or key is None:
            return []
        if event.runner_lost and residency.state is ResidencyState.READY:
            # The server still lists it, and would load it again inside the next request: unload it properly.
            return [rules.unload(self._fleet, key, "its runner died")]
        return []

    def _load_finished(self, event: LoadFinished, now: float) -> list[Action]:
        residency = self._fleet.by_load(event.load_id)
        if residency is None:
            return []
        key = (residency.instance, residency.blob)
        self._fleet.changed_at = now
        rules.finish_reservation(self._fleet, event.load_id, now)
        sizes = {"size_bytes": event.size_bytes, "size_vram_bytes": event.size_vram_bytes}
        until = expiry(residency.keep_alive_seconds, now)
        self._fleet.update(key, state=ResidencyState.READY, loaded_at=now, used_at=now, expires_at=until, **sizes)
        if residency.per_gpu_bytes and event.size_vram_bytes < event.size_bytes:
            share = 100.0 * (1 - event.size_vram_bytes / event.size_bytes)
            words = f"came out {share:.0f} % on the CPU on {residency.instance}"
            self._remember_failure(key, 502, f"model '{residency.name}' {words}", now)
            return [rules.unload(self._fleet, key, words)]
        return []

    def _load_failed(self, event: LoadFailed, now: float) -> None:
        residency = self._fleet.by_load(event.load_id)
        if residency is None:
            return
        key = (residency.instance, residency.blob)
        self._fleet.changed_at = now
        self._remember_failure(key, event.status, event.message, now)
        self._fleet.forget(key)

    def _remember_failure(self, key: ResidencyKey, status: int, message: str, now: float) -> None:
        options = self._fleet.residencies[key].options
        self._fleet.failures.append(Failure(key[0], key[1], options, status, message, now))

    def _unload_finished(self, event: UnloadFinished, now: float) -> None:
        key = (event.instance, event.blob)
        residency = self._fleet.residencies.get(key)
        if residency is None or residency.state is not ResidencyState.UNLOADING:
            return
        self._fleet.changed_at = now
        if event.error is not None:
            # It stays out of use, which a model that spilled has to, and is tried again without haste.
            self._fleet.update(key, expires_at=now + self._policy.room_timeout_seconds)
            return
        self._fleet.update(key, unloaded_at=now)
        if not residency.per_gpu_bytes:
            self._fleet.forget(key)

    def _unload_asked(self, event: UnloadAsked, now: float) -> list[Action]:
        actions: list[Action] = []
        for key, residency in list(self._fleet.residencies.items()):
            if residency.blob != event.blob or residency.state is ResidencyState.UNLOADING:
                continue
            if residency.in_flight or residency.state is not ResidencyState.READY:
                # A load on its way serves those who wait for it first.
                self._fleet.update(key, keep_alive_seconds=0.0, expires_at=now)
            else:
                actions.append(rules.unload(self._fleet, key, "a client asked for it"))
        return actions

    # --- time ----------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for ticket in self._queue.expired(now):
            waited = now - ticket.arrived_at
            why = self._reasons.get(ticket.id, "its turn")
            message = f"waited {waited:.0f} s (queue.timeout_seconds) for model '{ticket.model.name}': {why}"
            actions.append(self._reject(ticket, "wait_timeout", message))
        for key, residency in list(self._fleet.residencies.items()):
            if residency.expires_at is not None and residency.expires_at <= now and can_expire(residency, self._queue):
                again = residency.state is ResidencyState.UNLOADING
                why = "an unload before this one failed" if again else "its keep_alive ended"
                actions.append(rules.unload(self._fleet, key, why))
        return actions

    # --- the queue -----------------------------------------------------------------------------------------

    def _pump(self, now: float) -> list[Action]:
        actions = self._send_loads(now)
        blocked: set[ResidencyKey] = set()
        self._fleet.draining = blocked
        for head in self._queue.heads():
            actions += self._grant_group(head, now)
            if self._queue.group(group_of(head)):
                actions += self._make_place(head, blocked, now)
        return actions + self._send_loads(now)

    def _grant_group(self, head: Ticket, now: float) -> list[Action]:
        actions: list[Action] = []
        for ticket in self._queue.group(group_of(head)):
            grant = self._grant(self._fleet.snapshot(now), ticket, now)
            if grant is None:
                break
            self._queue.remove(ticket.id)
            self._reasons.pop(ticket.id, None)
            actions.append(grant)
        return actions

    def _grant(self, snapshot: Snapshot, ticket: Ticket, now: float) -> Grant | None:
        chosen = pick(r for r in snapshot.residencies.values() if can_serve(snapshot, r, ticket))
        if chosen is None:
            return None
        key = (chosen.instance, chosen.blob)
        self._fleet.take_slot(ticket.id, key, now)
        keep = merged_keep_alive(chosen.keep_alive_seconds, ticket.keep_alive_seconds, others_hold=chosen.in_flight > 0)
        self._fleet.update(key, keep_alive_seconds=keep)
        reason = f"{chosen.reason}; {chosen.in_flight} of {chosen.slots} slots were in use"
        url = snapshot.instances[chosen.instance].spec.url
        return Grant(ticket.id, chosen.instance, url, reason, chosen.options, chosen.context_length)

    def _make_place(self, head: Ticket, blocked: set[ResidencyKey], now: float) -> list[Action]:
        """Starts what brings the group's model in, unless a copy is loaded or on its way."""
        waiting, snapshot = self._queue.group(group_of(head)), self._fleet.snapshot(now)
        served = [r for r in snapshot.residencies.values() if self._will_serve(r) and suits(snapshot, r, head)]
        if served:
            self._explain(waiting, rules.describe_wait(served))
            return []
        decision = place(snapshot, self._estimate, head.model, head.options, head.layout)
        match decision:
            case Placed():
                self._explain(waiting, decision.reason)
                return self._plan(head, decision, now)
            case MustWait():
                self._explain(waiting, decision.reason)
                if now - head.arrived_at >= self._policy.drain_after_seconds:
                    blocked.update(decision.drain)
                return []
            case NoFit():
                return [self._reject(t, decision.code, decision.message, decision.status) for t in waiting]

    def _will_serve(self, residency: Residency) -> bool:
        leaves = residency.state is ResidencyState.UNLOADING
        return not leaves and self._fleet.instances[residency.instance].state is InstanceState.READY

    def _plan(self, head: Ticket, placed: Placed, now: float) -> list[Action]:
        """Reserves the room on all cards and unloads what stands in it; the load follows when the room shows."""
        own = (placed.instance, head.model.blob)
        actions: list[Action] = [
            rules.unload(self._fleet, key, f"makes room for {head.model.name}") for key in placed.evict
        ]
        if own in self._fleet.residencies:
            # The same weights with other options: planned again once this copy is gone.
            return actions
        load_id = self._loads.next()
        view = self._fleet.instances[placed.instance]
        self._fleet.reservations[load_id] = Reservation(
            load_id, placed.instance, head.model.blob, placed.per_gpu_bytes, now
        )
        slots = slots_of(head.model, view.spec, self._policy)
        self._fleet.residencies[own] = rules.planned(
            head, placed, view, slots, load_id, now, self._policy.keep_alive_seconds
        )
        return actions

    def _pending(self) -> Iterable[Reservation]:
        return (r for r in self._fleet.reservations.values() if r.sent_at is None)

    def _send_loads(self, now: float) -> list[Action]:
        """Sends each planned load whose room is now free, and plans anew those whose room did not come."""
        actions: list[Action] = []
        for reservation in list(self._pending()):
            residency = self._fleet.by_load(reservation.load_id)
            if residency is None:
                del self._fleet.reservations[reservation.load_id]
            elif rules.has_room(self._fleet.snapshot(now), reservation):
                actions.append(rules.send(self._fleet, residency, reservation, now))
            elif now - reservation.made_at >= self._policy.room_timeout_seconds:
                self._fleet.forget((residency.instance, residency.blob))
        return actions

    # --- endings -------------------------------------------------------------------------------------------

    def _explain(self, tickets: Iterable[Ticket], reason: str) -> None:
        for ticket in tickets:
            self._reasons[ticket.id] = reason

    def _reject(self, ticket: Ticket, code: str, message: str, status: int | None = None) -> Reject:
        self._queue.remove(ticket.id)
        self._reasons.pop(ticket.id, None)
        retry = self._retry_after() if code in ("queue_full", "shutting_down", "no_instance", "wait_timeout") else None
        return Reject(ticket.id, code, message, retry, status)
