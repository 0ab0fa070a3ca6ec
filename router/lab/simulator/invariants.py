"""Invariants of the scheduler, checked after every event of a simulated run.

They compare the scheduler's snapshot and actions with the memory that the simulated servers really hold. A violation
raises `InvariantError` with the time and the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from router.domain.actions import Action, Grant, Reject, Unload
from router.domain.events import Event, Released, UnloadFinished, UnloadRequested
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceState
from router.domain.model import BlobDigest
from router.domain.request import Ticket, TicketId
from router.domain.residency import STUCK_AFTER_FAILURES, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import overflow_instances
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request

STARVING_GRACE_SECONDS = 5.0
"""Time until a plan for a starving request begins or it is refused: readings settle, then a search follows."""
STALL_SECONDS = 75.0
"""Maximum time without progress while requests wait; longer than any retry delay."""


class InvariantError(AssertionError):
    """An invariant was violated."""


class ObservedRouter(Protocol):
    """The view of the router that the checks need."""

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]: ...

    @property
    def open_requests(self) -> Mapping[TicketId, Request]: ...

    def snapshot(self) -> Snapshot: ...

    def host_free_bytes(self) -> int:
        """Host memory that no runner holds."""
        ...

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        """Bytes that the model's runner really holds on each GPU; empty if there is none."""
        ...


class Invariants:
    """The checks of one run. Pass `check_actions` to `Llamayard` and `check_state` to `Simulation.run`."""

    def __init__(self) -> None:
        self._router: ObservedRouter | None = None
        self._machine: Machine | None = None
        self._progress_at = 0.0
        self._decided: set[TicketId] = set()
        self._grants: dict[TicketId, ResidencyKey] = {}
        self._failed_unloads: Counter[tuple[ResidencyKey, float]] = Counter()
        """By replica and when it was loaded."""
        self._granted_at: dict[tuple[str, BlobDigest], float] = {}
        """When a client was last granted a slot of a model."""
        self._no_plan_since: dict[TicketId, float] = {}
        """Since when a starving request waits and nothing is planned."""

    def watch(self, router: ObservedRouter, machine: Machine) -> None:
        self._router, self._machine = router, machine

    def check_actions(self, event: Event, actions: list[Action], now: float) -> None:
        """Checks the actions of one event before any is executed."""
        router = self._router
        if router is None:
            return
        if isinstance(event, Released):
            self._grants.pop(event.ticket_id, None)
        if isinstance(event, UnloadFinished):
            self._count_unload(router, event, now)
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

    def check_state(self) -> None:
        """Checks the state between two timeline events."""
        if self._router is None or self._machine is None:
            return
        now = self._machine.timeline.now
        snapshot = self._router.snapshot()
        self._check_gpus(self._router, snapshot, now)
        check_cpu(snapshot, self._router.host_free_bytes(), now)
        _check_reservations(snapshot, now)
        self._check_slots(snapshot, now)
        self._check_waiting(self._router, snapshot, now)
        self._check_starving(self._router, snapshot, now)

    # --- checks --------------------------------------------------------------------------------------------

    def _decide(self, router: ObservedRouter, action: Grant | Reject, now: float) -> None:
        """A ticket is decided exactly once."""
        if action.ticket_id in self._decided:
            raise InvariantError(f"{now:.3f}: ticket {action.ticket_id} was decided twice: {action}")
        self._decided.add(action.ticket_id)
        request = router.open_requests.get(action.ticket_id)
        if isinstance(action, Grant) and request is not None:
            if action.instance not in overflow_instances(router.snapshot()):
                self._check_overtaking(router, action.ticket_id, request, now)
            self._granted_at[request.user, request.model.blob] = now
            self._grants[action.ticket_id] = (action.instance, request.model.blob)

    def _check_overtaking(self, router: ObservedRouter, ticket: TicketId, request: Request, now: float) -> None:
        """No later request for a model overtakes one that starves, unless its client was served with it meanwhile."""
        starving = router.snapshot().policy.starving_after_seconds
        for waiting, _ in router.waiting:
            if waiting.model.blob != request.model.blob or waiting.id >= ticket or waiting.id in self._decided:
                continue
            since = max(waiting.arrived_at, self._granted_at.get((waiting.client, waiting.model.blob), 0.0))
            is_ending = request.arrived_at + 0.8 * router.snapshot().policy.queue_timeout_seconds <= now
            if now - since > starving and waiting.client != request.user and not is_ending:
                waited = f"has waited {now - waiting.arrived_at:.0f} s"
                raise InvariantError(
                    f"{now:.3f}: ticket {ticket} overtakes {waiting.id} of {waiting.client}, that {waited}"
                )

    def _check_unload(self, event: Event, unload: Unload, now: float) -> None:
        """A busy model is never evicted; only a crashed runner is unloaded with requests on it."""
        running = (unload.instance, unload.blob) in self._grants.values()
        is_allowed = isinstance(event, UnloadRequested) or (isinstance(event, Released) and event.runner_lost)
        if running and not is_allowed:
            raise InvariantError(f"{now:.3f}: {unload.instance} unloads busy {unload.model.name}: {unload.reason}")

    def _count_unload(self, router: ObservedRouter, event: UnloadFinished, now: float) -> None:
        """No unload fails for ever: a server that fails the second one is restarted."""
        key = (event.instance, event.blob)
        residency = router.snapshot().residencies.get(key)
        if event.error is None or residency is None:
            return
        self._failed_unloads[key, residency.loaded_at] += 1
        if self._failed_unloads[key, residency.loaded_at] > STUCK_AFTER_FAILURES:
            raise InvariantError(f"{now:.3f}: the unload of {residency.name} from {key[0]} keeps failing")

    def _check_gpus(self, router: ObservedRouter, snapshot: Snapshot, now: float) -> None:
        """Memory really held plus reservations of loads that are not settled yet never exceed a GPU.

        A load under way counts with its reservation, since nobody can know that it takes more. Replicas being unloaded,
        or whose memory is promised to a planned load, are not counted.
        """
        held: Counter[GpuUuid] = Counter()
        promised = snapshot.promised()
        reserved = {(r.instance, r.blob) for r in snapshot.reservations.values()}
        for key, residency in snapshot.residencies.items():
            is_there = residency.state in (ResidencyState.READY, ResidencyState.LOADING)
            if is_there and key not in promised and key not in reserved:
                held.update(router.bytes_held(key))
        for reservation in snapshot.reservations.values():
            is_leaving = (reservation.instance, reservation.blob) in promised and reservation.finished_at is not None
            if not is_leaving and reservation.aborted_at is None:
                held.update(dict(reservation.per_gpu_bytes))
        for uuid, size in held.items():
            gpu = snapshot.gpus[uuid]
            usable = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
            if size > usable:
                raise InvariantError(f"{now:.3f}: GPU {gpu.index}: {size} bytes held and reserved of {usable}")

    def _check_slots(self, snapshot: Snapshot, now: float) -> None:
        """A replica's slots in use equal the requests granted on it and do not exceed its slots."""
        granted = Counter(self._grants.values())
        for key, residency in snapshot.residencies.items():
            if residency.in_flight != granted[key] or residency.in_flight > residency.slots:
                counts = f"{residency.in_flight} in flight, {granted[key]} granted, {residency.slots} slots"
                raise InvariantError(f"{now:.3f}: {residency.name} on {key[0]}: {counts}")

    def _check_waiting(self, router: ObservedRouter, snapshot: Snapshot, now: float) -> None:
        """No request waits while its model has a free slot, and waiting requests see progress."""
        waiting = [ticket for ticket, _ in router.waiting]
        if not waiting or self._grants or _has_transitions(snapshot):
            self._progress_at = now
        if now - self._progress_at > STALL_SECONDS:
            raise InvariantError(
                f"{now:.3f}: {len(waiting)} requests wait and nothing has moved since {self._progress_at:.1f}"
            )
        blobs = {ticket.model.blob for ticket in waiting}
        for key, residency in snapshot.residencies.items():
            view = snapshot.instances.get(key[0])
            free = residency.state is ResidencyState.READY and residency.in_flight < residency.slots
            ready = view is not None and view.state is InstanceState.READY
            if residency.blob in blobs and free and ready and key not in snapshot.draining | _apart(snapshot):
                raise InvariantError(f"{now:.3f}: a request for {residency.name} waits despite a free slot on {key[0]}")

    def _check_starving(self, router: ObservedRouter, snapshot: Snapshot, now: float) -> None:
        """A request that starves has a plan, or waits for a slot; each wait has a reason."""
        stuck: dict[TicketId, float] = {}
        for ticket, reason in router.waiting:
            if not reason:
                raise InvariantError(f"{now:.3f}: ticket {ticket.id} waits for {ticket.model.name} without a reason")
            if now - ticket.arrived_at <= snapshot.policy.starving_after_seconds or _has_transitions(snapshot):
                continue
            known = (*snapshot.residencies.values(), *snapshot.failures)
            if any(r.blob == ticket.model.blob and (r.instance, r.blob) not in _apart(snapshot) for r in known):
                continue
            stuck[ticket.id] = self._no_plan_since.get(ticket.id, now)
            if now - stuck[ticket.id] > STARVING_GRACE_SECONDS:
                waited = f"waits for {now - ticket.arrived_at:.0f} s"
                raise InvariantError(f"{now:.3f}: {ticket.model.name} {waited} and nothing is planned: {reason}")
        self._no_plan_since = stuck


def _apart(snapshot: Snapshot) -> frozenset[ResidencyKey]:
    """Copies for CPU overflow: they serve only what would be late on the GPUs."""
    apart = overflow_instances(snapshot)
    return frozenset(key for key in snapshot.residencies if key[0] in apart) if apart else frozenset()


def check_cpu(snapshot: Snapshot, free_bytes: int, now: float) -> None:
    """Copies on the CPU leave the margin of host memory free, and serve one request at a time, fast enough to read."""
    cpu, keys = snapshot.policy.cpu, _apart(snapshot)
    if not keys or cpu is None:
        return
    if free_bytes < cpu.memory_margin_bytes:
        raise InvariantError(f"{now:.3f}: copies on the CPU leave {free_bytes} bytes of {cpu.memory_margin_bytes}")
    busy = [key for key in keys if snapshot.residencies[key].in_flight]
    if len(busy) > 1 or any(snapshot.residencies[key].in_flight > 1 for key in busy):
        raise InvariantError(f"{now:.3f}: more than one request runs on the CPU: {busy}")


def _has_transitions(snapshot: Snapshot) -> bool:
    in_transition = (ResidencyState.PLANNED, ResidencyState.LOADING, ResidencyState.UNLOADING)
    return any(r.state in in_transition for r in snapshot.residencies.values()) or not any(
        view.state is InstanceState.READY for view in snapshot.instances.values()
    )


def _check_reservations(snapshot: Snapshot, now: float) -> None:
    """A reservation covers all GPUs of its instance and belongs to a load."""
    owned = {r.load_id for r in snapshot.residencies.values()}
    for reservation in snapshot.reservations.values():
        view = snapshot.instances.get(reservation.instance)
        gpus = view.spec.gpus if view is not None else ()
        if tuple(uuid for uuid, _ in reservation.per_gpu_bytes) != gpus:
            raise InvariantError(f"{now:.3f}: {reservation} does not cover the GPUs of its instance")
        if reservation.load_id not in owned:
            raise InvariantError(f"{now:.3f}: {reservation} belongs to nothing")
