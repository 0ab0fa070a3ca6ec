"""Looks at the outside at a steady pace and posts what it sees: GPUs, each server's loaded models, the store's list.

A look that fails posts nothing and is logged once until it succeeds again: unknown is not empty. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from router.domain.events import Event, GpusRead, LoadedModel, ModelDiscovered, ResidencyRead
from router.domain.instance import InstanceState
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import OllamaError
from router.engines.ollama.driver import ClientFor
from router.gpu.poller import GpuPoller, GpuReadTimeout

Post = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class PollIntervals:
    """Seconds between two looks."""

    gpu_seconds: float
    residency_seconds: float
    catalog_seconds: float


class StatePoller:
    """`run` looks until cancelled."""

    def __init__(
        self,
        poller: GpuPoller,
        catalog: Catalog,
        client_for: ClientFor,
        snapshot: Callable[[], Snapshot],
        post: Post,
        now: Callable[[], float],
        intervals: PollIntervals,
        warm: tuple[str, ...] = (),
        clear: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`warm`: names of models whose facts are told as soon as the store has them. `clear` tidies the store up; it
        is called until it says that it has, or that it cannot."""
        self._poller = poller
        self._catalog = catalog
        self._client_for = client_for
        self._snapshot = snapshot
        self._post = post
        self._now = now
        self._intervals = intervals
        self._warm = warm
        self._clear = clear
        self._told: dict[str, ModelFacts] = {}
        self._failing: set[str] = set()
        self._look_now = asyncio.Event()
        self._log = structlog.get_logger("router.watcher")

    async def run(self) -> None:
        """Three steady looks side by side."""
        async with asyncio.TaskGroup() as looks:
            looks.create_task(self._steadily(self._intervals.gpu_seconds, "the GPUs", self.read_gpus, self._look_now))
            looks.create_task(
                self._steadily(self._intervals.residency_seconds, "loaded models", self._read_residencies)
            )
            looks.create_task(self._steadily(self._intervals.catalog_seconds, "the store", self._read_catalog))

    async def read_gpus(self) -> None:
        """One reading of the GPUs, posted with the time before it began."""
        read_at = self._now()
        self._post(GpusRead(await self._poller.read(), read_at))

    def poll_gpus(self) -> None:
        """Has the GPUs read at once, not at the next turn."""
        self._look_now.set()

    async def _steadily(
        self, seconds: float, what: str, look: Callable[[], Awaitable[None]], now: asyncio.Event | None = None
    ) -> None:
        """Looks at that pace, and whenever `now` is set."""
        now = now or asyncio.Event()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await now.wait()
            now.clear()
            try:
                await look()
            except (GpuReadTimeout, OllamaError, OSError) as error:
                self._failed(what, error)
            else:
                self._succeeded(what)

    async def _read_residencies(self) -> None:
        views = self._snapshot().instances.values()
        urls = [(v.spec.name, v.spec.url) for v in views if v.state is InstanceState.READY]
        await asyncio.gather(*(self._read_residency(name, url) for name, url in urls))

    async def _read_residency(self, name: str, url: str) -> None:
        read_at = self._now()
        try:
            rows = await self._client_for(url).ps()
            known = tuple([await self._with_facts(row) for row in rows])
        except OllamaError as error:
            self._failed(f"loaded models of {name}", error)
            return
        self._succeeded(f"loaded models of {name}")
        view = next((v for v in self._snapshot().instances.values() if v.spec.url == url), None)
        if view is not None:
            self._post(ResidencyRead(view.spec.name, known, read_at))

    async def _with_facts(self, row: LoadedModel) -> LoadedModel:
        """The row with the facts of what was loaded, whatever its name stands for today."""
        facts = await self._catalog.facts_of(row.name, row.digest)
        return row if facts is None else dataclasses.replace(row, model=facts)

    async def _read_catalog(self) -> None:
        await self._catalog.refresh()
        for name in self._warm:
            facts = await self._catalog.facts(name)
            if facts is not None and facts != self._told.get(name):
                self._told[name] = facts
                self._post(ModelDiscovered(facts))
        if self._clear is not None:
            await self._cleared(self._clear)

    async def _cleared(self, clear: Callable[[], Awaitable[bool]]) -> None:
        try:
            if not await clear():
                return
        except OllamaError as error:
            self._log.warning("leftovers_stay", why=error.message)
        self._clear = None

    def _failed(self, what: str, error: Exception) -> None:
        if what not in self._failing:
            self._failing.add(what)
            self._log.warning("cannot_read", what=what, error=str(error))

    def _succeeded(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            self._log.info("can_read_again", what=what)
