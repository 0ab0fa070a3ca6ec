"""A full queue, and who passes it by. One busy model, room for one, two requests for another waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path

import pytest

from tests.contract.conftest import Start
from tests.contract.differences import KNOWN, unexplained
from tests.contract.recording import recordings
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage, furnish
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.waiting import eventually

_OVERLOADS = [one for one in recordings() if "overload" in one.name]
_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
_REFUSAL_SECONDS = 20.0
"""By when a request that finds no room has been told so, on any machine."""


@pytest.fixture(scope="module")
def narrow(start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]) -> Generator[Stage]:
    """A server with one slot, room for one model and a queue of one."""
    folder: Path = tmp_path_factory.mktemp("narrow")
    limits = {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_MAX_QUEUE": "1"}
    with start(folder, **limits) as server:
        yield furnish(server, files)


@contextlib.asynccontextmanager
async def _full(stage: Stage) -> AsyncGenerator[list[asyncio.Task[Reply]]]:
    """Within the block the queue is full; yields the requests that wait. Afterwards the busy client has hung up."""
    stage.unload_all()
    stage.load("big")
    async with asyncio.TaskGroup() as tasks, connect(stage.server.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        assert (await busy.head()).status == 200
        await busy.chunk()
        waiting: list[asyncio.Task[Reply]] = []

        async def refused() -> bool:
            """Whether one more was refused; two wait, so of three one is, however long it takes to say so."""
            waiting.append(tasks.create_task(call(stage.server.address, "POST", "/api/generate", _SHORT)))
            settled = 0.3 if len(_undone(waiting)) < 3 else _REFUSAL_SECONDS
            await asyncio.wait(_undone(waiting), timeout=settled, return_when=asyncio.FIRST_COMPLETED)
            return any(task.done() for task in waiting) and len(_undone(waiting)) == 2

        await eventually(refused)
        assert {task.result().status for task in waiting if task.done()} == {503}
        yield _undone(waiting)
        busy.abort()


def _undone(tasks: list[asyncio.Task[Reply]]) -> list[asyncio.Task[Reply]]:
    return [task for task in tasks if not task.done()]


async def test_overload_is_told_at_once_in_the_shape_of_each_api(narrow: Stage) -> None:
    known = KNOWN[narrow.server.version]
    faults: dict[str, list[str]] = {}
    async with _full(narrow):
        for recording in _OVERLOADS:
            reply = await exchange(narrow.server.address, recording.request)
            faults[recording.name] = unexplained(
                recording.name, differences(shape(reply), shape(recording.reply)), known
            )
            assert reply.header("Retry-After") is None
    assert not {name: lines for name, lines in faults.items() if lines}


async def test_requests_that_wait_are_served_when_the_busy_client_leaves(narrow: Stage) -> None:
    async with _full(narrow) as waiting:
        assert len(waiting) == 2
    assert [(task.result().status, task.result().json()["eval_count"]) for task in waiting] == [(200, 2)] * 2


async def test_requests_for_the_loaded_model_pass_the_full_queue_by(narrow: Stage) -> None:
    short = {**_LONG, "stream": False, "options": {"num_predict": 2, "seed": 1}}
    async with asyncio.TaskGroup() as tasks, _full(narrow):
        passing = [tasks.create_task(call(narrow.server.address, "POST", "/api/generate", short)) for _ in range(3)]
        refused = narrow.server.version == "0.11.4"  # there every request went through the queue
        done, _ = await asyncio.wait(passing, timeout=_REFUSAL_SECONDS if refused else 0.5)
        assert len(done) == (3 if refused else 0)
    assert [task.result().status for task in passing] == [503 if refused else 200] * 3


async def test_a_client_that_leaves_the_queue_is_never_answered(narrow: Stage) -> None:
    """Its handler waits for the life of the server: it is dropped when its turn comes, and nobody is told."""
    narrow.unload_all()
    narrow.load("big")
    address = narrow.server.address
    async with asyncio.TaskGroup() as tasks, connect(address) as busy, connect(address) as placed:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        await busy.head()
        await placed.send(request_bytes("POST", "/api/generate", _SHORT))
        first = tasks.create_task(placed.reply())
        assert not (await asyncio.wait((first,), timeout=0.3))[0]
        async with connect(address) as queued:
            await queued.send(request_bytes("POST", "/api/generate", _SHORT))
            last = tasks.create_task(queued.reply())
            assert not (await asyncio.wait((last,), timeout=0.3))[0]
            queued.half_close()
            busy.abort()
            assert (await first).status == 200
            assert (await call(address, "POST", "/api/generate", _SHORT)).status == 200
            assert not (await asyncio.wait((last,), timeout=0.3))[0]
            last.cancel()
