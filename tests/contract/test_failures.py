"""Dying runners and servers, and models that do not fit: what clients see, and that the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
from collections.abc import Generator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.contract.conftest import Start
from tests.contract.differences import KNOWN_DIFFERENCES, KnownDifference, unexplained
from tests.contract.recording import Recording, recordings, recordings_by_title
from tests.contract.shape import differences, shape
from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import ModelFile, OllamaServer, create_from_file
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.tiny_model import ModelSpec, write_model
from tests.support.waiting import eventually

_TITLES = [recording.title for recording in recordings("0.34.0")]
RUNNER_KILLED = [title for title in _TITLES if re.match("runner-killed-(?!while)", title)]
TOO_LARGE = [title for title in _TITLES if title.startswith("does-not-fit")]
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}
_ADDRESS_BYTES = 6 * 1024**3
"""Address space of a server and of each of its runners; a small model needs 0.4 GB, the server itself 2 GB."""
_CHUNKS_BEFORE_KILL = 6
"""Enough for two pieces of text in each API's stream: all kinds of chunks have come by then."""
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


def _known_differences(stage: Stage) -> tuple[KnownDifference, ...]:
    return KNOWN_DIFFERENCES[stage.server.version]


def _unexplained(stage: Stage, recording: Recording, reply: Reply) -> list[str]:
    return unexplained(recording.name, differences(shape(reply), shape(recording.reply)), _known_differences(stage))


def _kill_runner(stage: Stage) -> None:
    assert len(stage.server.runners()) == 1, "one runner process, a child of the server"
    (runner,) = stage.server.runners()
    os.kill(runner, signal.SIGKILL)


def _recording(stage: Stage, title: str) -> Recording:
    if stage.server.version == "0.11.4" and re.search("v1-(messages|responses)", title):
        pytest.skip("/v1/messages and /v1/responses came after 0.11.4")
    return recordings_by_title(stage.server.version)[title]


async def reply_with_killed_runner(stage: Stage, recording: Recording) -> Reply:
    """Kills the runner in mid-stream, or else while it works on the request."""
    stage.unload_all()
    stage.load("big")
    async with connect(stage.server.address) as connection:
        await connection.send(recording.request)
        if recording.reply.chunked and recording.reply.status == 200:
            head = await connection.head()
            chunks = [await connection.chunk() for _ in range(_CHUNKS_BEFORE_KILL)]
            _kill_runner(stage)
            reply = await connection.rest(head, *(chunk for chunk in chunks if chunk is not None))
        else:
            probe = await _queued_probe(stage)
            _kill_runner(stage)
            reply = await connection.reply()
            await probe
    return reply


@pytest.mark.parametrize("title", RUNNER_KILLED)
async def test_an_answer_ends_as_recorded_when_its_runner_is_killed(stage: Stage, title: str) -> None:
    recording = _recording(stage, title)
    reply = await reply_with_killed_runner(stage, recording)
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


async def reply_of_queued_request(stage: Stage, recording: Recording) -> Reply:
    """Kills the runner while the request waits for its slot."""
    stage.unload_all()
    stage.load("big")
    async with asyncio.TaskGroup() as tasks, connect(stage.server.address) as busy:
        await busy.send(
            request_bytes("POST", "/api/generate", {**_SHORT, "stream": True, "options": {"num_predict": 3000}})
        )
        await busy.head()
        queued = tasks.create_task(exchange(stage.server.address, recording.request))
        assert not (await asyncio.wait((queued,), timeout=0.5))[0]
        assert await busy.chunk()
        _kill_runner(stage)
        busy.abort()
    return queued.result()


async def test_a_queued_request_gets_an_error_when_the_runner_is_killed(stage: Stage) -> None:
    recording = _recording(stage, "runner-killed-while-waiting")
    assert not _unexplained(stage, recording, await reply_of_queued_request(stage, recording))


async def test_ps_lists_a_model_with_a_dead_runner_and_the_next_request_reloads_it(stage: Stage) -> None:
    stage.unload_all()
    stage.load("tiny")
    _kill_runner(stage)
    await eventually(lambda: not stage.server.runners())
    assert list(stage.loaded()) == ["tiny:latest"]
    body = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    reply = await call(stage.server.address, "POST", "/api/generate", body)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


async def reply_cut_off(stage: Stage, recording: Recording, signal_number: signal.Signals) -> Reply:
    """Sends the signal to the server in mid-stream."""
    async with connect(stage.server.address) as connection:
        await connection.send(recording.request)
        head = await connection.head()
        first = await connection.chunk()
        assert first is not None
        stage.server.process.send_signal(signal_number)
        return await connection.rest(head, first)


@pytest.mark.parametrize("name", SIGNALS)
async def test_a_signal_cuts_streams_off_without_a_final_chunk(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile], name: str
) -> None:
    with start(tmp_path_factory.mktemp(name)) as server:
        stage = create_models(server, {"big": files["big"]})
        recording = _recording(stage, f"server-{name}-generate-stream")
        stage.load("big")
        runners = set(server.runners())
        reply = await reply_cut_off(stage, recording, SIGNALS[name])
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


def _oversized_context(server: OllamaServer) -> int:
    """Tokens whose KV cache never fits: in host memory, or from 0.30, which tries, in `_ADDRESS_BYTES`."""
    return 60_000_000 if server.is_0_30 and server.kind == "real" else 2_000_000_000


@contextlib.contextmanager
def with_oversized_models(stage: Stage, folder: Path) -> Generator[None]:
    """A small model with a trained context so long that its KV cache never fits.

    From 0.30 a server starts the load whatever it takes. Its address space is limited, so that it fails alone instead
    of taking the machine's memory.
    """
    context = _oversized_context(stage.server)
    spec = ModelSpec("chat", layers=2, width=64, feed_forward=128, heads=2, kv_heads=1, context=context)
    digest = write_model(folder / "wide.gguf", spec)
    create_from_file(stage.server, "wide", folder / "wide.gguf", digest)
    parameters = {"num_ctx": context, "num_thread": 1}
    create_from_file(stage.server, "widectx", folder / "wide.gguf", digest, parameters=parameters)
    limit = resource.prlimit(stage.server.process.pid, resource.RLIMIT_AS, (_ADDRESS_BYTES, resource.RLIM_INFINITY))
    yield
    resource.prlimit(stage.server.process.pid, resource.RLIMIT_AS, limit)
    stage.ensure_absent("wide")
    stage.ensure_absent("widectx")


async def reply_of_oversized(stage: Stage, recording: Recording) -> Reply:
    """Asks for a context that never fits; within `with_oversized_models`."""
    stage.unload_all()
    request = recording.request.replace(b"300000000", b"%d" % _oversized_context(stage.server))
    head, _, body = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
    return await exchange(stage.server.address, head + b"\r\n\r\n" + body)


@pytest.fixture(scope="module")
def oversized(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    with with_oversized_models(stage, tmp_path_factory.mktemp("wide")):
        yield stage


@pytest.mark.parametrize("title", TOO_LARGE)
async def test_a_model_that_never_fits_is_refused_immediately(oversized: Stage, title: str) -> None:
    recording = _recording(oversized, title)
    reply = await reply_of_oversized(oversized, recording)
    assert not _unexplained(oversized, recording, reply)
    assert not oversized.loaded()
    assert not oversized.server.runners()
