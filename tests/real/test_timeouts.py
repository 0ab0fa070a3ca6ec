"""Clients that wait for a slot get heartbeats, which they ignore, and errors within their streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 20000, "seed": 1}}
_HI = [{"role": "user", "content": "hi"}]
_OPTIONS = {"num_predict": 2, "seed": 1}


@contextmanager
def _with_one_slot(binary: Path, store: Path, folder: Path, queue_seconds: float) -> Generator[Product]:
    """One server with one slot per model and `big` loaded; heartbeats start immediately."""
    config = {
        "ollama": {"binary": str(binary), "models": str(store), "num_parallel": 1},
        "instances": [{"name": "a", "gpus": []}],
        "stream": {"heartbeat_seconds": 0.2},
        "queue": {"timeout_seconds": queue_seconds},
        "log": {"format": "json"},
    }
    with running(prepare(folder, config)) as product:
        loading = {"model": "big", "stream": False}
        eventually_sync(lambda: product.call("POST", "/api/generate", loading)[0] == 200, what="the model")
        yield product


@pytest.fixture(scope="module")
def long_timeout(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    """A router with a queue timeout that even slow machines do not reach."""
    with _with_one_slot(binary, store, tmp_path_factory.mktemp("patient"), 300.0) as product:
        yield product


@pytest.fixture(scope="module")
def short_timeout(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    """A router with a queue timeout of 3 s."""
    with _with_one_slot(binary, store, tmp_path_factory.mktemp("hasty"), 3.0) as product:
        yield product


@asynccontextmanager
async def _busy(product: Product) -> AsyncGenerator[Any]:
    """Holds the only slot of `big`; aborting the connection frees it."""
    async with connect(product.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        assert (await busy.head()).status == 200
        assert await busy.chunk()
        yield busy


async def _first_heartbeat(product: Product, path: str, body: dict[str, Any], busy: Any) -> tuple[bytes, bytes, str]:
    """Returns the first chunk, the whole body and the content type; frees the slot after the first heartbeat."""
    async with connect(product.address) as waiting:
        await waiting.send(request_bytes("POST", path, body))
        head = await waiting.head()
        first = await waiting.chunk()
        busy.abort()
        assert first is not None
        reply = await waiting.rest(head, first)
        assert (head.status, reply.end) == (200, "complete")
        return first, reply.body, head.header("Content-Type") or ""


async def test_ndjson_streams_get_spaces_as_heartbeats(long_timeout: Product) -> None:
    async with _busy(long_timeout) as busy:
        body = {"model": "big", "messages": _HI, "options": _OPTIONS}
        first, body_bytes, content_type = await _first_heartbeat(long_timeout, "/api/chat", body, busy)
    assert (first, content_type) == (b" ", "application/x-ndjson")
    assert [json.loads(line)["done"] for line in body_bytes.splitlines()] == [False, False, True]


async def test_event_streams_get_comments_as_heartbeats(long_timeout: Product) -> None:
    async with _busy(long_timeout) as busy:
        body = {"model": "big", "messages": _HI, "max_tokens": 2, "stream": True}
        first, body_bytes, content_type = await _first_heartbeat(long_timeout, "/v1/chat/completions", body, busy)
    assert (first, content_type) == (b": waiting\n\n", "text/event-stream")
    assert body_bytes.endswith(b"data: [DONE]\n\n")


async def test_an_unstreamed_request_gets_no_heartbeats(short_timeout: Product) -> None:
    async with _busy(short_timeout):
        body = {"model": "big", "messages": _HI, "stream": False}
        reply = await call(short_timeout.address, "POST", "/api/chat", body)
    assert (reply.status, reply.header("Content-Type")) == (504, "application/json; charset=utf-8")


async def test_a_client_can_disable_heartbeats(short_timeout: Product) -> None:
    async with _busy(short_timeout):
        body = {"model": "big", "messages": _HI}
        reply = await call(short_timeout.address, "POST", "/api/chat", body, (("X-Llamayard-Heartbeat", "off"),))
    assert reply.status == 504
    assert "waited" in reply.json()["error"]


async def test_an_error_after_the_first_heartbeat_is_sent_in_the_stream(short_timeout: Product) -> None:
    async with _busy(short_timeout):
        lines = await call(short_timeout.address, "POST", "/api/chat", {"model": "big", "messages": _HI})
        assert (lines.status, lines.end) == (200, "complete")
        assert "waited" in lines.lines()[-1]["error"]
        body = {"model": "big", "messages": _HI, "stream": True}
        events = await call(short_timeout.address, "POST", "/v1/chat/completions", body)
        assert (events.status, events.end) == (200, "complete")
        assert "waited" in events.events()[-1]["error"]["message"]


async def test_the_client_packages_ignore_heartbeats(long_timeout: Product) -> None:
    ollama_connection: Any = ollama.AsyncClient(host=long_timeout.address.url)
    openai_connection: Any = openai.AsyncOpenAI(base_url=long_timeout.address.url + "/v1", api_key="x", max_retries=0)
    async with ollama_connection as ollama_client, openai_connection as openai_client, _busy(long_timeout) as busy:
        stream = asyncio.ensure_future(ollama_client.chat("big", _HI, stream=True, options=_OPTIONS))
        parts = await stream  # its head arrives with the first heartbeat
        busy.abort()
        assert [part.done async for part in parts] == [False, False, True]
        async with _busy(long_timeout) as busy_again:
            events = await openai_client.chat.completions.create(model="big", messages=_HI, max_tokens=2, stream=True)
            busy_again.abort()
            contents = [event.choices[0].delta.content async for event in events if event.choices]
            assert len([content for content in contents if content]) == 2


async def test_the_client_packages_raise_a_late_error(short_timeout: Product) -> None:
    ollama_connection: Any = ollama.AsyncClient(host=short_timeout.address.url)
    openai_connection: Any = openai.AsyncOpenAI(base_url=short_timeout.address.url + "/v1", api_key="x", max_retries=0)
    async with ollama_connection as ollama_client, openai_connection as openai_client, _busy(short_timeout):
        with pytest.raises(ollama.ResponseError, match="waited"):
            _ = [part async for part in await ollama_client.chat("big", _HI, stream=True)]
        with pytest.raises(openai.APIError, match="waited"):
            events = await openai_client.chat.completions.create(model="big", messages=_HI, stream=True)
            _ = [event async for event in events]
