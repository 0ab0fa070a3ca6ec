"""Dying runners and servers, and models that do not fit: what clients see, and that the next request works."""

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
from tests.contract.differences import KNOWN_DIFFERENCES, KnownDifference, unexplained
from tests.contract.recording import Recording, recordings
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import ModelFile, create_from_file
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.tiny_model import ModelSpec, write_model
from tests.support.waiting import eventually

_BY_NAME = {recording.name.removeprefix("0.24.0/"): recording for recording in recordings()}
_RUNNER_KILLED = [recording for name, recording in _BY_NAME.items() if re.match("runner-killed-(?!while)", name)]
_TOO_LARGE = [recording for name, recording in _BY_NAME.items() if name.startswith("does-not-fit")]
_SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


def _known_differences(stage: Stage) -> tuple[KnownDifference, ...]:
    return KNOWN_DIFFERENCES[stage.server.version]


def _unexplained(stage: Stage, recording: Recording, reply: Reply) -> list[str]:
    return unexplained(recording.name, differences(shape(reply), shape(recording.reply)), _known_differences(stage))


def _kill_runner(stage: Stage) -> None:
    assert len(stage.server.runners()) == 1, "one runner process, a child of the server"
    (runner,) = stage.server.runners()
    os.kill(runner, signal.SIGKILL)


def _skip_if_unsupported(stage: Stage, recording: Recording) -> None:
    if stage.server.version == "0.11.4" and re.search("v1-(messages|responses)", recording.name):
        pytest.skip("/v1/messages and /v1/responses came after 0.11.4")


@pytest.mark.parametrize("recording", _RUNNER_KILLED, ids=[recording.name for recording in _RUNNER_KILLED])
async def test_an_answer_ends_as_recorded_when_its_runner_is_killed(stage: Stage, recording: Recording) -> None:
    _skip_if_unsupported(stage, recording)
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
            probe = await _queued_probe(stage)
            _kill_runner(stage)
            reply = await connection.reply()
            await probe
    assert not _unexplained(stage, recording, reply)
    again = await call(stage.server.address, "POST", "/api/generate", _SHORT)
    assert (again.status, again.json()["eval_count"]) == (200, 2)


async def _queued_probe(stage: Stage) -> asyncio.Future[Reply]:
    """Sends a short request that queues for the only slot, which proves that the previous request holds it."""

    async def queued_request() -> asyncio.Future[Reply] | None:
        probe = asyncio.ensure_future(call(stage.server.address, "POST", "/api/generate", _SHORT))
        done, _ = await asyncio.wait({probe}, timeout=1.0)
        return None if done else probe

    probe = await eventually(queued_request, what="a queued request")
    assert probe is not None
    return probe


async def test_a_queued_request_gets_an_error_when_the_runner_is_killed(stage: Stage) -> None:
    recording = _BY_NAME["runner-killed-while-waiting"]
    stage.unload_all()
    stage.load("big")
    async with asyncio.TaskGroup() as tasks, connect(stage.server.address) as busy:
        await busy.send(
            request_bytes("POST", "/api/generate", {**_SHORT, "stream": True, "options": {"num_predict": 3000}})
        )
        await busy.head()
        queued = tasks.create_task(exchange(stage.server.address, recording.request))
        for _ in range(10):
            assert await busy.chunk()
        _kill_runner(stage)
        busy.abort()
    assert not _unexplained(stage, recording, queued.result())


async def test_ps_lists_a_model_with_a_dead_runner_and_the_next_request_reloads_it(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny")
    _kill_runner(stage)
    await eventually(lambda: not stage.server.runners())
    assert list(stage.loaded()) == ["tiny:latest"]
    body = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    reply = await call(stage.server.address, "POST", "/api/generate", body)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


@pytest.mark.parametrize("name", _SIGNALS)
async def test_a_signal_cuts_streams_off_without_a_final_chunk(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile], name: str
) -> None:
    recording = _BY_NAME[f"server-{name}-generate-stream"]
    with start(tmp_path_factory.mktemp(name)) as server:
        stage = create_models(server, {"big": files["big"]})
        stage.load("big")
        runners = set(server.runners())
        async with connect(server.address) as connection:
            await connection.send(recording.request)
            head = await connection.head()
            first = await connection.chunk()
            assert first is not None
            server.process.send_signal(_SIGNALS[name])
            reply = await connection.rest(head, first)
        assert not _unexplained(stage, recording, reply)
        await eventually(lambda: server.process.poll() is not None)
        assert server.process.returncode == (-signal.SIGKILL if name == "sigkill" else 0)
        if name == "sigkill":  # the runner outlives its server: always kill the process group
            assert runners
            assert all(psutil.pid_exists(pid) for pid in runners)
        else:
            await eventually(lambda: not any(psutil.pid_exists(pid) for pid in runners))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def oversized(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    """A small model with a trained context so long that its KV cache never fits."""
    spec = ModelSpec("chat", layers=2, width=64, feed_forward=128, heads=2, kv_heads=1, context=2_000_000_000)
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    digest = write_model(path, spec)
    create_from_file(stage.server, "wide", path, digest)
    create_from_file(stage.server, "widectx", path, digest, parameters={"num_ctx": 2_000_000_000, "num_thread": 1})
    yield stage
    stage.ensure_absent("wide")
    stage.ensure_absent("widectx")


@pytest.mark.parametrize("recording", _TOO_LARGE, ids=[recording.name for recording in _TOO_LARGE])
async def test_a_model_that_never_fits_is_refused_immediately(oversized: Stage, recording: Recording) -> None:
    _skip_if_unsupported(oversized, recording)
    oversized.unload_all()
    request = recording.request.replace(b"300000000", b"2000000000")
    head, _, body = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
    reply = await exchange(oversized.server.address, head + b"\r\n\r\n" + body)
    assert not _unexplained(oversized, recording, reply)
    assert not oversized.loaded()
    assert not oversized.server.runners()
