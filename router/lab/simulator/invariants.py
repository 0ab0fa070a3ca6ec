"""What must hold in every run of the router, checked after everything that happens.

It looks at the core's snapshot, at what the simulated servers really hold and at what the core asked for; it changes
nothing. A broken rule is an `InvariantError` that names it with the time and the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from router.domain.actions import Action, Grant, Reject, Unload
from router.domain.events import Event, Released, UnloadRequested
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceState
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request

STALL_SECONDS = 75.0
"""Longer than a failure is remembered: so long nothing may move while somebody waits."""


class InvariantError(AssertionError):
    """A rule was broken."""


class ObservedRouter(Protocol):
    """The router, as far as the rules look at it."""

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]: ...

    @property
    def held(self) -> Mapping[TicketId, Request]: ...

    def snapshot(self) -> Snapshot: ...

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        """What a model's runner really holds on each GPU; empty where it has none."""
        ...


class Invariants:
    """One run's checks. `seen` is given to `Llamayard`, `after_each` to `Simulation.run`."""

    def __init__(self) -> None:
        self._router: ObservedRouter | None = None
        self._machine: Machine | None = None
        self._moved_at = 0.0
        self._decided: set[TicketId] = set()
        self._grants: dict[TicketId, ResidencyKey] = {}

    def watch(self, router: ObservedRouter, machine: Machine) -> None:
        self._router, self._machine = router, machine

    def seen(self, event: Event, actions: list[Action], now: float) -> None:
        """The actions that one event brought, before any is carried out."""
        router = self._router
        if router is None:
            return
        if isinstance(event, Released):
            self._grants.pop(event.ticket_id, None)
        for action in actions:
            match action:
                case Unload():
                    self._check_unload(event, action, now)
                case Grant() | Reject():
                    self._decide(router, action, now)
                case _:
                    pass
        residencies = router.snapshot().residencies
        self._grants = {ticket: key for ticket, key in self._grants.items() if key in residencies}

    def after_step(self) -> None:
        """The state between two things that happen."""
        if self._router is None or self._machine is None:
            return
        now = self._machine.timeline.now
        snapshot = self._router.snapshot()
        self._check_gpus(self._router, snapshot, now)
        _check_reservations(snapshot, now)
        self._check_slots(snapshot, now)
        self._check_waiting(self._router, snapshot, now)

    # --- rules ---------------------------------------------------------------------------------------------

    def _decide(self, router: ObservedRouter, action: Grant | Reject, now: float) -> None:
        """A ticket ends once, in one way."""
        if action.ticket_id in self._decided:
            raise InvariantError(f"{now:.3f}: ticket {action.ticket_id} was decided twice: {action}")
        self._decided.add(action.ticket_id)
        request = router.held.get(action.ticket_id)
        if isinstance(action, Grant) and request is not None:
            self._grants[action.ticket_id] = (action.instance, request.model.blob)

    def _check_unload(self, event: Event, unload: Unload, now: float) -> None:
        """Busy models are never evicted: only a dead runner is unloaded with requests on it."""
        running = (unload.instance, unload.blob) in self._grants.values()
        excused = isinstance(event, UnloadRequested) or (isinstance(event, Released) and event.runner_lost)
        if running and not excused:
            raise InvariantError(f"{now:.3f}: {unload.instance} unloads busy {unload.model.name}: {unload.reason}")

    def _check_gpus(self, router: ObservedRouter, snapshot: Snapshot, now: float) -> None:
        """What is loaded in truth and what is reserved for loads that have taken nothing yet never exceed a GPU; what
        is on its way out, or has its room promised to a planned load, is not counted."""
        held: Counter[GpuUuid] = Counter()
        promised = snapshot.promised()
        for key, residency in snapshot.residencies.items():
            if key not in promised and residency.state in (ResidencyState.READY, ResidencyState.LOADING):
                held.update(router.bytes_held(key))
        for reservation in snapshot.reservations.values():
            if not router.bytes_held((reservation.instance, reservation.blob)):
                held.update(dict(reservation.per_gpu_bytes))
        for uuid, size in held.items():
            gpu = snapshot.gpus[uuid]
            usable = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
            if size > usable:
                raise InvariantError(f"{now:.3f}: GPU {gpu.index}: {size} bytes held and reserved of {usable}")

    def _check_slots(self, snapshot: Snapshot, now: float) -> None:
        """The slots in use of a copy are the requests that were granted on it, and no more than it has."""
        granted = Counter(self._grants.values())
        for key, residency in snapshot.residencies.items():
            if residency.in_flight != granted[key] or residency.in_flight > residency.slots:
                words = f"{residency.in_flight} in flight, {granted[key]} granted, {residency.slots} slots"
                raise InvariantError(f"{now:.3f}: {residency.name} on {key[0]}: {words}")

    def _check_waiting(self, router: ObservedRouter, snapshot: Snapshot, now: float) -> None:
        """Nobody waits beside a free slot of his model, and somebody who waits sees something move."""
        waiting = [ticket for ticket, _ in router.waiting]
        if not waiting or self._grants or _is_moving(snapshot):
            self._moved_at = now
        if now - self._moved_at > STALL_SECONDS:
            raise InvariantError(
                f"{now:.3f}: {len(waiting)} requests wait and nothing has moved since {self._moved_at:.1f}"
            )
        blobs = {ticket.model.blob for ticket in waiting}
        for key, residency in snapshot.residencies.items():
            view = snapshot.instances.get(key[0])
            free = residency.state is ResidencyState.READY and residency.in_flight < residency.slots
            ready = view is not None and view.state is InstanceState.READY
            if residency.blob in blobs and free and ready and key not in snapshot.draining:
                raise InvariantError(f"{now:.3f}: a request for {residency.name} waits beside a free slot on {key[0]}")


def _is_moving(snapshot: Snapshot) -> bool:
    on_the_way = (ResidencyState.PLANNED, ResidencyState.LOADING, ResidencyState.UNLOADING)
    return any(r.state in on_the_way for r in snapshot.residencies.values()) or not any(
        view.state is InstanceState.READY for view in snapshot.instances.values()
    )


def _check_reservations(snapshot: Snapshot, now: float) -> None:
    """A reservation is on all GPUs of its instance or is none, and belongs to a load."""
    owned = {r.load_id for r in snapshot.residencies.values()}
    for reservation in snapshot.reservations.values():
        view = snapshot.instances.get(reservation.instance)
        gpus = view.spec.gpus if view is not None else ()
        if tuple(uuid for uuid, _ in reservation.per_gpu_bytes) != gpus:
            raise InvariantError(f"{now:.3f}: {reservation} does not cover the GPUs of its instance")
        if reservation.load_id not in owned:
            raise InvariantError(f"{now:.3f}: {reservation} belongs to nothing")
