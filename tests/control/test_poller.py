"""The pollers post readings with the time before the reading, and nothing if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import aiohttp
import pytest
from aiohttp import web

from router.control.poller import PollIntervals, StatePoller
from router.domain.events import Event, GpusRead, ResidencyRead
from router.domain.gpu import Gpu
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.snapshot import Snapshot
from router.engines.base import ModelSource
from router.engines.ollama.client import OllamaError
from router.engines.ollama.engine import OllamaEngine
from router.engines.ollama.instance_plan import InstancePlan
from router.gpu.poller import GpuPoller
from tests.scheduler.builders import gpu, snapshot
from tests.support.scripted_server import Scripted, failing, scripted
from tests.support.waiting import eventually

NEVER = 3600.0
SOON = 0.01
BLOB = "b" * 64
Clear = Callable[[], Awaitable[bool]]


@dataclass
class Reader:
    """GPUs whose reading can be made to fail."""

    error: Exception | None = None
    reads: int = 0

    def read(self) -> tuple[Gpu, ...]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return (gpu(0, self.reads),)

    def close(self) -> None: ...


class Engine(OllamaEngine):
    """Ollama with a replaceable cleanup."""

    clear: Clear | None = None

    async def tidy(self) -> bool:
        return await self.clear() if self.clear is not None else True


@dataclass
class Watch:
    server: Scripted
    reader: Reader
    state_poller: StatePoller
    facts: Snapshot
    now: float = 10.0
    posted: list[Event] = field(default_factory=list[Event])

    def readings(self) -> list[ResidencyRead]:
        return [event for event in self.posted if isinstance(event, ResidencyRead)]


def _no_tuning(name: str) -> NoReturn:
    raise AssertionError(f"no instance is started here: {name}")


@asynccontextmanager
async def watch(
    gpus: float = NEVER, models: float = NEVER, store: float = NEVER, clear: Clear | None = None
) -> AsyncGenerator[Watch]:
    answers = {"/api/tags": {"models": [{"name": "tiny:latest", "digest": "d1"}]},
               "/api/show": {"modelfile": f"FROM /m/sha256-{BLOB}"}, "/api/ps": {"models": []}}  # fmt: skip
    async with aiohttp.ClientSession() as session, scripted(answers) as server:
        reader = Reader()
        poller = GpuPoller(reader)
        spec = InstanceSpec(InstanceName("gpu0"), (), server.url)
        held: Watch
        posted: list[Event] = []
        plan = InstancePlan("", _no_tuning)
        engine = Engine((), plan, session, lambda: held.facts, lambda: 0.0, asyncio.Lock())
        engine.clear = clear
        engines: dict[str, ModelSource] = {engine.kind: engine}
        state_poller = StatePoller(
            poller, engines, lambda: held.facts, posted.append, lambda: held.now, PollIntervals(gpus, models, store)
        )
        held = Watch(
            server, reader, state_poller, snapshot([], [InstanceView(spec, InstanceState.READY)]), posted=posted
        )
        running = asyncio.ensure_future(state_poller.run())
        try:
            yield held
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await engine.close()
            await poller.close()


async def test_gpus_are_posted_with_the_time_before_the_reading() -> None:
    async with watch() as on:
        await on.state_poller.read_gpus()
        assert on.posted == [GpusRead((gpu(0, 1),), 10.0)]


async def test_gpus_are_read_regularly_even_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    async with watch(gpus=SOON) as on:
        await eventually(lambda: len(on.posted) >= 2)
        on.reader.error = OSError("no such device")
        failed = on.reader.reads
        await eventually(lambda: on.reader.reads > failed + 3)
        on.reader.error = None
        before = len(on.posted)
        await eventually(lambda: len(on.posted) > before)
    told = capsys.readouterr().out
    assert told.count("cannot_read") == 1
    assert told.count("can_read_again") == 1
    assert "no such device" in told


async def test_loaded_models_are_posted_with_their_facts_and_the_time_before_the_request() -> None:
    async with watch(models=SOON) as on:

        async def ps(_: Any) -> web.Response:
            on.now = 20.0
            rows = [{"name": name, "digest": digest, "size": 5, "size_vram": 5}
                    for name, digest in (("tiny:latest", "d1"), ("gone:latest", "d9"))]  # fmt: skip
            return web.json_response({"models": rows})

        on.server.answers["/api/ps"] = ps
        await eventually(lambda: any(reading.models for reading in on.readings()))
        found = next(reading for reading in on.readings() if reading.models)
        assert (found.instance, found.read_at) == ("gpu0", 10.0)
        known, unknown = found.models
        assert known.model is not None
        assert (known.model.blob, unknown.model) == (f"sha256:{BLOB}", None)


@pytest.mark.parametrize("path", ["/api/ps", "/api/tags"])
async def test_a_failed_poll_is_not_taken_for_an_empty_server(path: str) -> None:
    async with watch(models=SOON) as on:
        row = {"name": "tiny:latest", "digest": "d1", "size": 5, "size_vram": 5}
        on.server.answers["/api/ps"] = {"models": [row]}
        on.server.answers[path] = failing(500)
        before, asked = len(on.readings()), len(on.server.requests)
        await eventually(lambda: len(on.server.requests) > asked + 6)
        assert len(on.readings()) <= before + 1


async def test_a_server_at_rest_is_not_read_at_every_poll() -> None:
    async with watch(models=SOON, store=SOON) as on:
        await eventually(on.readings)
        polled = on.server.paths().count("/api/tags")
        await eventually(lambda: on.server.paths().count("/api/tags") > polled + 20)
        assert on.server.paths().count("/api/ps") == 1  # no time has passed
        on.now += 5 * SOON
        await eventually(lambda: on.server.paths().count("/api/ps") == 2)


async def test_only_ready_servers_are_polled() -> None:
    async with watch(models=SOON) as on:
        await eventually(on.readings)
        spec = next(iter(on.facts.instances.values())).spec
        on.facts = snapshot([], [InstanceView(spec, InstanceState.BACKOFF)])
        asked: list[int] = []

        async def settled() -> bool:
            asked.append(len(on.server.requests))
            return len(asked) > 5 and len(set(asked[-5:])) == 1

        await eventually(settled)


@pytest.mark.parametrize("answers", [[False, True], [OllamaError(500, "no")]])
async def test_the_store_is_cleaned_until_that_succeeds_or_fails(
    answers: list[bool | OllamaError], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[None] = []

    async def clear() -> bool:
        asked.append(None)
        answer = answers[len(asked) - 1]
        if isinstance(answer, OllamaError):
            raise answer
        return answer

    async with watch(store=SOON, clear=clear) as on:
        await eventually(lambda: len(asked) == len(answers))
        seen = on.server.paths().count("/api/tags")
        await eventually(lambda: on.server.paths().count("/api/tags") > seen + 2)
    assert len(asked) == len(answers)
    assert capsys.readouterr().out.count("leftovers_stay") == (answers[-1] is not True)


async def test_the_list_of_models_is_refreshed_regularly() -> None:
    async with watch(store=SOON) as on:
        await eventually(lambda: on.server.paths().count("/api/tags") >= 2)
        on.server.answers["/api/tags"] = failing(500)
        failed = on.server.paths().count("/api/tags")
        await eventually(lambda: on.server.paths().count("/api/tags") > failed + 2)
