"""A controller over a driver that records loads and unloads, and ends them when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from router.control.controller import Controller, rejection
from router.domain.actions import Action, Grant, Load, Reject, Unload
from router.domain.events import Event, GpusRead, InstanceChanged, LoadFailed, LoadFinished, UnloadFinished
from router.domain.footprint import FootprintKey, MeasuredFootprint
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.request import Ticket
from router.domain.residency import ResidencyState
from router.scheduler.dispatcher import Dispatcher
from tests.scheduler.builders import BY_WEIGHT, gpu, instance, model

SMALL = model("small", 1000)
OTHER = model("other", 1000)


class RecordingDriver:
    """Loads and unloads run until the test ends them."""

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self.started: list[InstanceSpec] = []
        self.stopped: list[InstanceName] = []
        self.restarted: list[tuple[InstanceName, str]] = []
        self.readings = 0
        self.remembered: list[tuple[FootprintKey, tuple[int, ...]]] = []
        self.unloads: list[Unload] = []
        self.cancelled: list[Load | Unload] = []
        self._ends: dict[int, asyncio.Future[LoadFinished | LoadFailed | Exception]] = {}
        self._gone: list[asyncio.Future[str | None]] = []

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        self.loads.append(load)
        end = self._ends[load.load_id] = asyncio.get_running_loop().create_future()
        try:
            outcome = await end
        except asyncio.CancelledError:
            self.cancelled.append(load)
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def start_instance(self, spec: InstanceSpec) -> None:
        self.started.append(spec)

    def stop_instance(self, name: InstanceName) -> None:
        self.stopped.append(name)

    def restart_instance(self, name: InstanceName, reason: str) -> None:
        self.restarted.append((name, reason))

    def remember(self, footprint: MeasuredFootprint) -> None:
        self.remembered.append((footprint.key, footprint.per_gpu_bytes))

    def read_gpus(self) -> None:
        self.readings += 1

    async def unload(self, unload: Unload) -> UnloadFinished:
        self.unloads.append(unload)
        end: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._gone.append(end)
        try:
            return UnloadFinished(unload.instance, unload.blob, await end)
        except asyncio.CancelledError:
            self.cancelled.append(unload)
            raise

    def end_load(self, outcome: LoadFinished | LoadFailed | Exception | None = None, at: int = -1) -> None:
        load = self.loads[at]
        self._ends[load.load_id].set_result(outcome or LoadFinished(load.load_id, 10, 10))

    def end_unload(self, error: str | Exception | None = None) -> None:
        if isinstance(error, Exception):
            self._gone[-1].set_exception(error)
        else:
            self._gone[-1].set_result(error)


@dataclass
class RecordingObserver:
    seen: list[tuple[Event, list[Action]]] = field(default_factory=list[tuple[Event, list[Action]]])

    def observe(self, event: Event, actions: list[Action], now: float) -> None:
        self.seen.append((event, list(actions)))


@dataclass
class Stage:
    """A running controller over one GPU and one ready instance."""

    controller: Controller
    driver: RecordingDriver
    observer: RecordingObserver

    def ticket(self, of: ModelFacts = SMALL, ttft_target_seconds: float = 60.0) -> Ticket:
        now = self.controller.now()
        return Ticket(self.controller.new_ticket_id(), of, (), 0, None, now, now + ttft_target_seconds)

    @asynccontextmanager
    async def slot(
        self, of: ModelFacts = SMALL, ttft_target_seconds: float = 60.0, *, runner_lost: bool = False
    ) -> AsyncGenerator[Grant]:
        """Waits for a slot, holds it during the block and releases it; cancels its ticket if it is cancelled."""
        ticket = self.ticket(of, ttft_target_seconds)
        decision: asyncio.Future[Grant | Reject] = asyncio.get_running_loop().create_future()
        decided: list[Grant | Reject] = []

        def decide(found: Grant | Reject) -> None:
            decided.append(found)
            if not decision.done():
                decision.set_result(found)

        self.controller.submit(ticket, decide)
        try:
            found = await decision
        except asyncio.CancelledError:
            if decided and isinstance(decided[0], Grant):
                self.controller.release(ticket.id)
            else:
                self.controller.cancel(ticket.id)
            raise
        if isinstance(found, Reject):
            raise rejection(found)
        try:
            yield found
        finally:
            self.controller.release(ticket.id, runner_lost=runner_lost)

    def taken(self) -> int:
        """Slots in use, of all models."""
        return sum(found.in_flight for found in self.controller.snapshot().residencies.values())

    async def load(self, of: ModelFacts = SMALL) -> None:
        """Loads a model; it is idle afterwards."""
        task = asyncio.ensure_future(self.use(of))
        await turns()
        self.driver.end_load()
        await task
        assert self.state(of) is ResidencyState.READY

    async def use(self, of: ModelFacts = SMALL) -> str:
        """Makes one request that ends at once; returns the instance that served it."""
        async with self.slot(of) as grant:
            return grant.instance

    def state(self, of: ModelFacts) -> ResidencyState | None:
        found = [r for r in self.controller.snapshot().residencies.values() if r.blob == of.blob]
        return found[0].state if found else None


async def turns(count: int = 5) -> None:
    """Runs the event loop for some turns, enough for everything that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def stage(policy: Policy | None = None, slots: int = 2) -> AsyncGenerator[Stage]:
    driver, observer = RecordingDriver(), RecordingObserver()
    clock: Callable[[], float] = asyncio.get_running_loop().time
    dispatcher = Dispatcher(policy or Policy(vram_margin_bytes=0), BY_WEIGHT)
    async with Controller(dispatcher, driver, clock, (observer,)) as controller:
        controller.post(GpusRead((gpu(0, 24_000),), controller.now()))
        controller.post(InstanceChanged(instance("gpu0", 0, slots=slots), InstanceState.READY))
        observer.seen.clear()
        yield Stage(controller, driver, observer)
