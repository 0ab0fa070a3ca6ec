"""A full queue, and which requests bypass it: one busy model, room for one, two queued requests for another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path

import pytest

from tests.contract.conftest import Start
from tests.contract.differences import KNOWN_DIFFERENCES, unexplained
from tests.contract.recording import recordings, recordings_by_title
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.waiting import eventually

OVERLOADS = [recording.title for recording in recordings("0.34.0") if "overload" in recording.name]
LIMITS = {"OLLAMA_NUM_PARALLEL": "1", "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_MAX_QUEUE": "1"}
_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
_REFUSAL_SECONDS = 20.0
"""Deadline for refusing a request when the queue is full, on any machine."""


@pytest.fixture(scope="module")
def limited(start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]) -> Generator[Stage]:
    """A server with one slot, room for one model and a queue of one."""
    folder: Path = tmp_path_factory.mktemp("narrow")
    with start(folder, **LIMITS) as server:
        yield create_models(server, files)


@contextlib.asynccontextmanager
async def full_queue(stage: Stage) -> AsyncGenerator[list[asyncio.Task[Reply]]]:
    """Keeps the queue full within the block; yields the queued requests. Then the busy client disconnects."""
    stage.unload_all()
    stage.load("big")
    async with asyncio.TaskGroup() as tasks, connect(stage.server.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        assert (await busy.head()).status == 200
        await busy.chunk()
        queued_tasks: list[asyncio.Task[Reply]] = []

        async def is_refused() -> bool:
            """Sends one more request. Two are queued, so one of three is refused, however long the refusal takes."""
            queued_tasks.append(tasks.create_task(call(stage.server.address, "POST", "/api/generate", _SHORT)))
            timeout_seconds = 0.3 if len(_pending(queued_tasks)) < 3 else _REFUSAL_SECONDS
            await asyncio.wait(_pending(queued_tasks), timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            return any(task.done() for task in queued_tasks) and len(_pending(queued_tasks)) == 2

        await eventually(is_refused)
        assert {task.result().status for task in queued_tasks if task.done()} == {503}
        yield _pending(queued_tasks)
        busy.abort()


def _pending(tasks: list[asyncio.Task[Reply]]) -> list[asyncio.Task[Reply]]:
    return [task for task in tasks if not task.done()]


async def test_overload_is_reported_immediately_in_the_format_of_each_api(limited: Stage) -> None:
    known_differences = KNOWN_DIFFERENCES[limited.server.version]
    unexplained_by_name: dict[str, list[str]] = {}
    async with full_queue(limited):
        for recording in map(recordings_by_title(limited.server.version).__getitem__, OVERLOADS):
            reply = await exchange(limited.server.address, recording.request)
            unexplained_by_name[recording.name] = unexplained(
                recording.name, differences(shape(reply), shape(recording.reply)), known_differences
            )
            assert reply.header("Retry-After") is None
    assert not {name: lines for name, lines in unexplained_by_name.items() if lines}


async def test_queued_requests_are_served_when_the_busy_client_disconnects(limited: Stage) -> None:
    async with full_queue(limited) as queued_tasks:
        assert len(queued_tasks) == 2
    assert [(task.result().status, task.result().json()["eval_count"]) for task in queued_tasks] == [(200, 2)] * 2


async def test_requests_for_the_loaded_model_bypass_the_full_queue(limited: Stage) -> None:
    short = {**_LONG, "stream": False, "options": {"num_predict": 2, "seed": 1}}
    async with asyncio.TaskGroup() as tasks, full_queue(limited):
        bypassing = [tasks.create_task(call(limited.server.address, "POST", "/api/generate", short)) for _ in range(3)]
        is_refused = limited.server.version == "0.11.4"  # all its requests go through the queue
        done, _ = await asyncio.wait(bypassing, timeout=_REFUSAL_SECONDS if is_refused else 0.5)
        assert len(done) == (3 if is_refused else 0)
    assert [task.result().status for task in bypassing] == [503 if is_refused else 200] * 3


async def test_a_client_that_disconnects_while_queued_is_never_answered(limited: Stage) -> None:
    """It is silently dropped when its turn comes; its handler leaks until the server ends."""
    limited.unload_all()
    limited.load("big")
    address = limited.server.address
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
