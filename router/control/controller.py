"""The single writer: turns what happens into events, asks the dispatcher, and carries out its actions.

Everything that changes routing state passes through `post`, which is synchronous, so that nothing interleaves and no
lock is needed. Loads and unloads run as tasks that the controller owns, on connections of their own, and end in events
again: a client that disconnects does not cancel a load.

It decides nothing itself, and knows neither HTTP nor processes: an `InstanceDriver` does the loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Protocol, Self, assert_never

import structlog

from router.domain.actions import (
    AbortLoad,
    Action,
    Grant,
    Load,
    Notice,
    ReadGpus,
    Reject,
    Remember,
    RestartInstance,
    StartInstance,
    StopInstance,
    Unload,
)
from router.domain.events import (
    Arrived,
    Cancelled,
    Event,
    LoadFailed,
    Released,
    ShutdownBegan,
    Ticked,
    UnloadFinished,
)
from router.domain.explanation import Explanation
from router.domain.footprint import MeasuredFootprint
from router.domain.health import ReplyFailure
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.request import Ticket, TicketId
from router.domain.snapshot import Snapshot
from router.engines.base import Loader
from router.errors import RouterError, error_for
from router.scheduler.dispatcher import Dispatcher
from router.scheduler.queue.wait_estimate import WaitEstimate

Clock = Callable[[], float]
Decided = Callable[[Grant | Reject], None]

_EARLIEST_WAKE_SECONDS = 0.01
_WAIT_ESTIMATE_SECONDS = 0.5
"""For this long, wait estimates are reused when one ticket is asked about."""


class InstanceDriver(Loader, Protocol):
    """Carries out what the dispatcher asks for."""

    def start_instance(self, spec: InstanceSpec) -> None:
        """Asks for one more instance on the GPUs of `spec`; what becomes of it comes as `InstanceChanged`."""
        ...

    def stop_instance(self, name: InstanceName) -> None:
        """Asks for the end of an instance that was started on demand."""
        ...

    def restart_instance(self, name: InstanceName, reason: str) -> None:
        """Asks for the end of an instance's server, and for the next one unless it was started on demand."""
        ...

    def remember(self, footprint: MeasuredFootprint) -> None:
        """Keeps a measured footprint for later runs."""
        ...

    def read_gpus(self) -> None:
        """Asks for a reading of the GPUs now; it comes as `GpusRead`."""
        ...


class Observer(Protocol):
    """Sees every event and action in order; must not raise and must not call back."""

    def observe(self, event: Event, actions: list[Action], now: float) -> None: ...


class Controller:
    """Owns the dispatcher. Use inside `async with`: leaving it ends its tasks."""

    def __init__(
        self, dispatcher: Dispatcher, driver: InstanceDriver, clock: Clock, observers: tuple[Observer, ...] = ()
    ) -> None:
        self._dispatcher = dispatcher
        self._driver = driver
        self.now = clock
        """The clock of all times here, in seconds."""
        self._observers = observers
        self._waiters: dict[TicketId, Decided] = {}
        self._next_ticket = 0
        self._until: list[tuple[Callable[[Snapshot], bool], asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        """When the timer is due."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._load_tasks: dict[LoadId, asyncio.Task[None]] = {}
        self._wait_estimates: tuple[float, Mapping[TicketId, WaitEstimate]] = (float("-inf"), {})
        """When they were last computed, and the result."""
        self._log = structlog.get_logger("router.control.controller")

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- for the proxy and the API -------------------------------------------------------------------------

    def new_ticket_id(self) -> TicketId:
        self._next_ticket += 1
        return TicketId(self._next_ticket)

    def submit(self, ticket: Ticket, decided: Decided) -> None:
        """Asks for a slot. `decided` is called once, perhaps before this returns, unless `cancel` comes first."""
        self._waiters[ticket.id] = decided
        self.post(Arrived(ticket))

    def cancel(self, ticket_id: TicketId) -> None:
        """The client of a ticket that still waits went away."""
        if self._waiters.pop(ticket_id, None) is not None:
            self.post(Cancelled(ticket_id))

    def release(
        self,
        ticket_id: TicketId,
        *,
        runner_lost: bool = False,
        output_tokens: int = 0,
        first_byte_at: float | None = None,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> None:
        """Gives a granted slot back; each grant must end in exactly one of these."""
        self.post(Released(ticket_id, runner_lost, output_tokens, first_byte_at, silent_seconds, failure))

    def snapshot(self) -> Snapshot:
        return self._dispatcher.snapshot(self.now())

    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        return self._dispatcher.waiting

    def running(self) -> list[tuple[InstanceName, float]]:
        """Instance and time of the grant of each request that holds a slot."""
        return self._dispatcher.running()

    def fair_share_spread(self) -> float:
        """Most minus fewest weighted tokens that waiting clients have received; 0.0 while fewer than two wait."""
        return self._dispatcher.fair_share_spread()

    def wait_estimates(self) -> Mapping[TicketId, WaitEstimate]:
        """The estimate of each waiting ticket, in serving order."""
        now = self.now()
        self._wait_estimates = now, self._dispatcher.wait_estimates(now)
        return self._wait_estimates[1]

    def wait_estimate(self, ticket_id: TicketId) -> WaitEstimate | None:
        """The estimate of one ticket, at most half a second old, since many may ask. None if it does not wait."""
        if ticket_id not in self._waiters:
            return None
        at, known = self._wait_estimates
        if ticket_id not in known or self.now() - at >= _WAIT_ESTIMATE_SECONDS:
            known = self.wait_estimates()
        return known.get(ticket_id)

    def explain(self, ticket: Ticket) -> Explanation:
        """What would become of the ticket if it were submitted now. Changes nothing."""
        return self._dispatcher.explain(ticket, self.now())

    def explain_placement(self, ticket_id: TicketId) -> tuple[Explanation, Snapshot] | None:
        """Where a past or waiting ticket's model was loaded for it, with the facts of that time; None if unknown."""
        return self._dispatcher.explain_placement(ticket_id)

    @property
    def is_closing(self) -> bool:
        return self._dispatcher.is_closing

    def begin_shutdown(self) -> None:
        self.post(ShutdownBegan())

    @property
    def watcher_count(self) -> int:
        """How many wait in `until`."""
        return len(self._until)

    async def until(self, is_so: Callable[[Snapshot], bool], deadline_seconds: float) -> bool:
        """Waits until `is_so` returns True, which is checked after each event. Returns False after the deadline."""
        if is_so(self.snapshot()):
            return True
        future: asyncio.Future[None] = self._loop.create_future()
        self._until.append((is_so, future))
        try:
            done, _ = await asyncio.wait({future}, timeout=deadline_seconds)
        finally:
            self._until = [each for each in self._until if each[1] is not future]
        return bool(done)

    # --- the one way in ------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Applies one event and starts what it asks for. Synchronous and not reentrant but for `decided` callbacks."""
        now = self.now()
        actions = self._dispatcher.handle(event, now)
        for observer in self._observers:
            observer.observe(event, actions, now)
        for action in actions:
            self._carry_out(action)
        for is_so, future in self._until:
            if not future.done() and is_so(self._dispatcher.snapshot(now)):
                future.set_result(None)
        self._set_timer(now)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant() | Reject():
                decided = self._waiters.pop(action.ticket_id, None)
                if decided is not None:
                    decided(action)
            case Load() | AbortLoad():
                self._load_or_abort(action)
            case Unload():
                self._start(self._unload(action))
            case StartInstance():
                self._driver.start_instance(action.spec)
            case StopInstance():
                self._driver.stop_instance(action.instance)
            case RestartInstance():
                self._driver.restart_instance(action.instance, action.reason)
            case Notice():
                pass  # for observers
            case Remember():
                self._driver.remember(action.footprint)
            case ReadGpus():
                self._driver.read_gpus()
            case _:
                assert_never(action)

    def _load_or_abort(self, action: Load | AbortLoad) -> None:
        if isinstance(action, Load):
            self._load_tasks[action.load_id] = self._start(self._load(action))
            return
        loading = self._load_tasks.pop(action.load_id, None)
        if loading is not None:
            loading.cancel()  # drops the connection, which ends the load on the server

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, load: Load) -> None:
        try:
            outcome = await self._driver.load(load)
        except Exception as error:
            self._log.exception("load failed unexpectedly", instance=load.instance, model=load.model.name)
            outcome = LoadFailed(load.load_id, 502, f"{type(error).__name__}: {error}")
        self._load_tasks.pop(load.load_id, None)
        self.post(outcome)

    async def _unload(self, unload: Unload) -> None:
        try:
            outcome = await self._driver.unload(unload)
        except Exception as error:
            self._log.exception("unload failed unexpectedly", instance=unload.instance, model=unload.model.name)
            outcome = UnloadFinished(unload.instance, unload.blob, f"{type(error).__name__}: {error}")
        self.post(outcome)

    def _set_timer(self, now: float) -> None:
        """A timer that is due too early stays: `_wake` sets it anew, so that most requests set none."""
        due = self._dispatcher.next_wake()
        if due is None or due >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_later(max(_EARLIEST_WAKE_SECONDS, due - now), self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        now, due = self.now(), self._dispatcher.next_wake()
        if due is not None and due - now < _EARLIEST_WAKE_SECONDS:
            self.post(Ticked())
        else:
            self._set_timer(now)


def rejection(reject: Reject) -> RouterError:
    """The error that a client gets for a rejected ticket."""
    return error_for(reject.code, reject.message, reject.status, reject.retry_after_seconds)
