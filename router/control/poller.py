"""Polls GPUs, loaded models and model lists at a steady pace, and posts what it reads as events.

Loaded models of a server at rest are read less often (`router/control/idle_polls.py`). A failed poll posts no event,
because unknown is not empty; it is logged once until a poll succeeds again. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from router.control.idle_polls import Sight, is_due, sight_of
from router.domain.events import Event, GpusRead, ModelDiscovered, ResidencyRead
from router.domain.gpu import Gpu
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.base import EngineError, ModelSource

Post = Callable[[Event], None]


class GpuSource(Protocol):
    async def read(self) -> tuple[Gpu, ...]:
        """Returns all GPUs. A failed reading raises an `OSError`."""
        ...


@dataclass(frozen=True, slots=True)
class PollIntervals:
    """Seconds between two polls."""

    gpu_seconds: float
    residency_seconds: float
    catalog_seconds: float


class StatePoller:
    """`run` polls until cancelled."""

    def __init__(
        self,
        gpus: GpuSource,
        engines: Mapping[str, ModelSource],
        snapshot: Callable[[], Snapshot],
        post: Post,
        now: Callable[[], float],
        intervals: PollIntervals,
        warm: tuple[str, ...] = (),
        host_free_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`engines`: by kind. `warm`: names of models to report as discovered as soon as an engine has them.

        `host_free_bytes` is read together with the GPUs; it must not block.
        """
        self._host_free_bytes = host_free_bytes
        self._gpus = gpus
        self._engines = engines
        self._snapshot = snapshot
        self._post = post
        self._now = now
        self._intervals = intervals
        self._warm = warm
        self._discovered: dict[str, ModelFacts] = {}
        self._untidied = set(engines)
        """Engines that may still have leftovers of an earlier run."""
        self._seen: dict[InstanceName, Sight] = {}
        """What was known of each ready server when its loaded models were last read."""
        self._failing: set[str] = set()
        self._poll_gpus_now = asyncio.Event()
        self._poll_models_now = {kind: asyncio.Event() for kind in engines}
        self._log = structlog.get_logger("router.watcher")

    async def run(self) -> None:
        """Polls the GPUs, the loaded models, and the model list of each engine."""
        intervals = self._intervals
        async with asyncio.TaskGroup() as polls:
            polls.create_task(self._steadily(intervals.gpu_seconds, "the GPUs", self.read_gpus, self._poll_gpus_now))
            polls.create_task(self._steadily(intervals.residency_seconds, "loaded models", self.read_residencies))
            for engine in self._engines.values():
                polls.create_task(self._poll_models(engine))

    async def read_gpus(self) -> None:
        """Reads the GPUs once and posts them with the time before the reading began."""
        read_at = self._now()
        free_bytes = self._host_free_bytes()
        self._post(GpusRead(await self._gpus.read(), read_at, free_bytes))

    def poll_gpus(self) -> None:
        """Reads the GPUs now instead of at the next interval."""
        self._poll_gpus_now.set()

    def poll_models(self) -> None:
        """Reads the lists of models now, for those that shall be warm."""
        if self._warm:
            for now in self._poll_models_now.values():
                now.set()

    def set_warm(self, names: tuple[str, ...]) -> None:
        """Names of models to report as discovered from now on."""
        self._warm = names
        self.poll_models()

    async def _steadily(
        self, seconds: float, what: str, poll: Callable[[], Awaitable[None]], now: asyncio.Event | None = None
    ) -> None:
        """Polls at that interval, and whenever `now` is set."""
        now, loop = now or asyncio.Event(), asyncio.get_running_loop()
        while True:
            timer = loop.call_later(seconds, now.set)
            try:
                await now.wait()
            finally:
                timer.cancel()
            now.clear()
            try:
                await poll()
            except (EngineError, OSError) as error:
                self._failed(what, error)
            else:
                self._succeeded(what)

    async def read_residencies(self) -> None:
        """Reads once what the ready servers have loaded, as far as it is due, and posts it."""
        snapshot, seconds = self._snapshot(), self._intervals.residency_seconds
        ready = [view.spec for view in snapshot.instances.values() if view.state is InstanceState.READY]
        now, seen = self._now(), self._seen
        due = [spec for spec in ready if is_due(snapshot, spec, seen.get(spec.name), now, seconds)]
        self._seen = {spec.name: seen[spec.name] for spec in ready if spec.name in seen}
        self._seen |= {spec.name: sight_of(snapshot, spec, now) for spec in due}
        await asyncio.gather(*map(self._read_residency, due))

    async def _read_residency(self, spec: InstanceSpec) -> None:
        read_at = self._now()
        try:
            rows = await self._engines[spec.engine].loaded(spec)
        except EngineError as error:
            self._failed(f"loaded models of {spec.name}", error)
            self._seen.pop(spec.name, None)
            return
        self._succeeded(f"loaded models of {spec.name}")
        view = next((v for v in self._snapshot().instances.values() if v.spec.url == spec.url), None)
        if view is not None:
            self._post(ResidencyRead(view.spec.name, rows, read_at))

    async def _poll_models(self, engine: ModelSource) -> None:
        async def poll() -> None:
            await self._read_models(engine)

        now = self._poll_models_now[engine.kind]
        await self._steadily(self._intervals.catalog_seconds, f"the models of {engine.title}", poll, now)

    async def _read_models(self, engine: ModelSource) -> None:
        await engine.refresh()
        for name in self._warm:
            facts = await engine.facts(name)
            if facts is not None and facts != self._discovered.get(name):
                self._discovered[name] = facts
                self._post(ModelDiscovered(facts))
        if engine.kind in self._untidied:
            await self._tidy(engine)

    async def _tidy(self, engine: ModelSource) -> None:
        try:
            if not await engine.tidy():
                return
        except EngineError as error:
            self._log.warning("leftovers_stay", why=error.message)
        self._untidied.discard(engine.kind)

    def _failed(self, what: str, error: Exception) -> None:
        if what not in self._failing:
            self._failing.add(what)
            self._log.warning("cannot_read", what=what, error=str(error))

    def _succeeded(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            self._log.info("can_read_again", what=what)
