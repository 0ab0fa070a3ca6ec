"""Runners and servers that die, and models that do not fit: what clients see, and that the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Generator, Mapping

import psutil
import pytest

from tests.contract.conftest import Start
from tests.contract.differences import KNOWN, Known, unexplained
from tests.contract.recording import Recording, recordings
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage, furnish
from tests.support.ollama_server import ModelFile, create_from_file
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.tiny_model import ModelSpec, write_model
from tests.support.waiting import eventually

_BY_NAME = {one.name.removeprefix("0.24.0/"): one for one in recordings()}
_RUNNER_KILLED = [one for name, one in _BY_NAME.items() if re.match("runner-killed-(?!while)", name)]
_UNFIT = [one for name, one in _BY_NAME.items() if name.startswith("does-not-fit")]
_SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


def _known(stage: Stage) -> tuple[Known, ...]:
    return KNOWN[stage.server.version]


def _faults(stage: Stage, recording: Recording, reply: Reply) -> list[str]:
    return unexplained(recording.name, differences(shape(reply), shape(recording.reply)), _known(stage))


def _kill_runner(stage: Stage) -> None:
    assert len(stage.server.runners()) == 1, "one runner process, a child of the server"
    (runner,) = stage.server.runners()
    os.kill(runner, signal.SIGKILL)


def _supported(stage: Stage, recording: Recording) -> None:
    if stage.server.version == "0.11.4" and re.search("v1-(messages|responses)", recording.name):
        pytest.skip("/v1/messages and /v1/responses came after 0.11.4")


@pytest.mark.parametrize("recording", _RUNNER_KILLED, ids=[one.name for one in _RUNNER_KILLED])
async def test_a_killed_runner_ends_the_answer_as_recorded(stage: Stage, recording: Recording) -> None:
    _supported(stage, recording)
    stage.unload_all()
    stage.load("big")
    async with connect(stage.server.address) as connection:
        await connection.send(recording.request)
        if recording.reply.chunked and recording.reply.status == 200:
            head = await connection.head()
            first = await connection.chunk()
            assert first is not None
            _kill_runner(stage)
            reply = await connection.rest(head, first)
        else:
            probe = await _started_behind(stage)
            _kill_runner(stage)
            reply = await connection.reply()
            await probe
    assert not _faults(stage, recording, reply)
    again = await call(stage.server.address, "POST", "/api/generate", _SHORT)
    assert (again.status, again.json()["eval_count"]) == (200, 2)


async def _started_behind(stage: Stage) -> asyncio.Future[Reply]:
    """A short request that waits for the one slot, which shows that the request before it has taken it."""

    async def waits() -> asyncio.Future[Reply] | None:
        probe = asyncio.ensure_future(call(stage.server.address, "POST", "/api/generate", _SHORT))
        done, _ = await asyncio.wait({probe}, timeout=1.0)
        return None if done else probe

    probe = await eventually(waits, what="a request that waits")
    assert probe is not None
    return probe


async def test_a_request_that_waits_for_a_killed_runner_is_told(stage: Stage) -> None:
    recording = _BY_NAME["runner-killed-while-waiting"]
    stage.unload_all()
    stage.load("big")
    async with asyncio.TaskGroup() as tasks, connect(stage.server.address) as busy:
        await busy.send(
            request_bytes("POST", "/api/generate", {**_SHORT, "stream": True, "options": {"num_predict": 3000}})
        )
        await busy.head()
        waiting = tasks.create_task(exchange(stage.server.address, recording.request))
        for _ in range(10):
            assert await busy.chunk()
        _kill_runner(stage)
        busy.abort()
    assert not _faults(stage, recording, waiting.result())


async def test_ps_lists_a_dead_idle_model_and_the_next_request_loads_it_again(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny")
    _kill_runner(stage)
    await eventually(lambda: not stage.server.runners())
    assert list(stage.loaded()) == ["tiny:latest"]
    body = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    reply = await call(stage.server.address, "POST", "/api/generate", body)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


@pytest.mark.parametrize("name", _SIGNALS)
async def test_a_signal_cuts_streams_off_without_a_last_chunk(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile], name: str
) -> None:
    recording = _BY_NAME[f"server-{name}-generate-stream"]
    with start(tmp_path_factory.mktemp(name)) as server:
        stage = furnish(server, {"big": files["big"]})
        stage.load("big")
        runners = set(server.runners())
        async with connect(server.address) as connection:
            await connection.send(recording.request)
            head = await connection.head()
            first = await connection.chunk()
            assert first is not None
            server.process.send_signal(_SIGNALS[name])
            reply = await connection.rest(head, first)
        assert not _faults(stage, recording, reply)
        await eventually(lambda: server.process.poll() is not None)
        assert server.process.returncode == (-signal.SIGKILL if name == "sigkill" else 0)
        if name == "sigkill":  # the runner outlives its server: whoever kills a server must kill its group
            assert runners
            assert all(psutil.pid_exists(pid) for pid in runners)
        else:
            await eventually(lambda: not any(psutil.pid_exists(pid) for pid in runners))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def wide(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    """A small model with a trained context so long that its cache fits no memory."""
    spec = ModelSpec("chat", layers=2, width=64, feed_forward=128, heads=2, kv_heads=1, context=2_000_000_000)
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    digest = write_model(path, spec)
    create_from_file(stage.server, "wide", path, digest)
    create_from_file(stage.server, "widectx", path, digest, parameters={"num_ctx": 2_000_000_000, "num_thread": 1})
    yield stage
    stage.absent("wide")
    stage.absent("widectx")


@pytest.mark.parametrize("recording", _UNFIT, ids=[one.name for one in _UNFIT])
async def test_a_model_that_fits_no_memory_is_refused_at_once(wide: Stage, recording: Recording) -> None:
    _supported(wide, recording)
    wide.unload_all()
    request = recording.request.replace(b"300000000", b"2000000000")
    head, _, body = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
    reply = await exchange(wide.server.address, head + b"\r\n\r\n" + body)
    assert not _faults(wide, recording, reply)
    assert not wide.loaded()
    assert not wide.server.runners()
