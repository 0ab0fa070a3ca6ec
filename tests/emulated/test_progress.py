"""Queue positions of waiting requests, in their streams and in the status, on emulated GPUs and servers."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Connection, call, connect, request_bytes
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_ENDLESS = replace(LLAMA_8B, vocabulary=2048)
"""A model with so small a vocabulary generates until it is stopped."""
_HI = [{"role": "user", "content": "hi"}]
_PROGRESS = re.compile(
    rb": llamayard position=(\d+)(?: expected_wait_seconds=(\d+))?(?: reason=([^\n]*))?\n"
    rb'(?:\n|event: ping\ndata: \{"type": "ping"\}\n\n)'
)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    config = {
        "log": {"format": "json"},
        "stream": {"heartbeat_seconds": 0.2},
        "models": {"small": {"num_parallel": 1, "replicas_max": 1}},
        "poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2},
    }
    speed = {"LLAMAYARD_RIG_SPEED": "4"}
    with running(prepare(tmp_path_factory.mktemp("rig"), config, speed, ("--rig", "2x3090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "small", _ENDLESS)
        yield router


def _waiting(product: Product, request_id: str = "") -> list[dict[str, Any]]:
    path = "/llamayard/status" + (f"?request_id={request_id}" if request_id else "")
    return product.call("GET", path)[1]["waiting"]


@asynccontextmanager
async def _queue(product: Product, length: int) -> AsyncGenerator[list[Connection]]:
    """Requests that take minutes: the first has the only slot, the others queue. They end by disconnecting."""
    short_request = {"model": "small", "prompt": "hi", "options": {"num_predict": 2}, "stream": False}
    assert (await call(product.address, "POST", "/api/generate", short_request)).status == 200
    endless_request = {"model": "small", "prompt": "hi", "stream": False}
    async with AsyncExitStack() as stack:
        connections: list[Connection] = []
        for number in range(length):
            connection = await stack.enter_async_context(connect(product.address))
            headers = (("X-Request-ID", f"ahead-{number}"),)
            await connection.send(request_bytes("POST", "/api/generate", endless_request, headers))
            connections.append(connection)
            await eventually(lambda n=number: len(_waiting(product)) == n, what="its position in the queue")
        yield connections
    await eventually(lambda: not _waiting(product), what="an empty queue")


async def _progress_at(connection: Connection, position: int) -> re.Match[bytes]:
    """Reads progress comments until the given position; earlier ones have higher positions."""
    while True:
        chunk = await connection.chunk()
        assert chunk is not None
        progress = _PROGRESS.fullmatch(chunk)
        assert progress is not None, chunk
        if int(progress[1]) == position:
            return progress
        assert int(progress[1]) > position


_STREAMS = [
    ("/v1/chat/completions", {"messages": _HI, "max_tokens": 3}, "[DONE]"),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 3}, "[DONE]"),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 3}, "response.completed"),
    ("/v1/messages", {"messages": _HI, "max_tokens": 3}, "message_stop"),
]


@pytest.mark.parametrize(("path", "body", "last"), _STREAMS, ids=[path for path, _, _ in _STREAMS])
async def test_a_stream_with_progress_shows_its_falling_position_and_then_the_answer(
    product: Product, path: str, body: dict[str, Any], last: str
) -> None:
    async with _queue(product, 3) as ahead, connect(product.address) as stream:
        progress_header = (("X-Llamayard-Progress", "1"),)
        await stream.send(request_bytes("POST", path, {"model": "small", "stream": True, **body}, progress_header))
        head = await stream.head()
        assert (head.status, head.header("Content-Type")) == (200, "text/event-stream")
        expected_waits: list[int] = []
        for position in (3, 2, 1):
            progress = await _progress_at(stream, position)
            assert progress[3] is not None
            assert progress[3].startswith(b"1 of 1 slots are in use on gpu")
            expected_waits.append(int(progress[2]))
            ahead[position - 1].abort()
        assert expected_waits == sorted(expected_waits, reverse=True)
        reply = await stream.rest_after_head()
    assert reply.end == "complete"
    last_event = reply.events()[-1]
    assert last_event in (last, {**last_event, "type": last} if isinstance(last_event, dict) else last)


async def test_a_stream_with_progress_reports_the_load_it_waits_for(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "small", "keep_alive": 0})
    await eventually(lambda: not any(product.resident().values()), what="nothing loaded")
    async with connect(product.address) as stream:
        body = {"model": "small", "stream": True, "prompt": "hi", "max_tokens": 3}
        await stream.send(request_bytes("POST", "/v1/completions", body, (("X-Llamayard-Progress", "1"),)))
        await stream.head()
        progress = await _progress_at(stream, 1)
        reply = await stream.rest_after_head()
    assert progress[2] is not None
    assert progress[3] is not None
    assert progress[3].startswith((b"gpu", b"room is being made on gpu", b"it is being loaded on gpu"))
    assert reply.events()[-1] == "[DONE]"


async def test_a_stream_without_progress_gets_plain_heartbeats(product: Product) -> None:
    async with _queue(product, 1) as ahead, connect(product.address) as stream:
        body = {"model": "small", "stream": True, "messages": _HI, "max_tokens": 3}
        await stream.send(request_bytes("POST", "/v1/chat/completions", body))
        await stream.head()
        assert await stream.chunk() == b": waiting\n\n"
        ahead[0].abort()
        reply = await stream.rest_after_head()
    assert b"llamayard" not in reply.body
    assert reply.events()[-1] == "[DONE]"


async def test_the_status_shows_the_position_of_each_request_and_can_be_filtered(product: Product) -> None:
    async with _queue(product, 4):
        rows = _waiting(product)
        assert [(row["position"], row["request_id"]) for row in rows] == [(n, f"ahead-{n}") for n in (1, 2, 3)]
        expected_waits = [row["expected_wait_seconds"] for row in rows]
        assert expected_waits == sorted(expected_waits)
        assert expected_waits[0] >= 0.0
        (row,) = _waiting(product, "ahead-2")
        assert (row["position"], row["model"]) == (2, "small:latest")
        assert _waiting(product, "ahead-0") == []  # it has a slot
        status, filtered_status = product.call("GET", "/llamayard/status?request_id=nobody")
        assert (status, filtered_status) == (200, {"queue": {"waiting": 3, "limit": 512}, "waiting": []})
