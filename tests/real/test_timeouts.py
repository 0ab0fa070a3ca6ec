"""Clients that wait for a slot are kept with bytes that they ignore, and learn of errors within their streams."""

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
    """One server with one slot a model, `big` loaded; heartbeats begin at once."""
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
def patient(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    """Whoever waits is served in the end, however slow the machine is."""
    with _with_one_slot(binary, store, tmp_path_factory.mktemp("patient"), 300.0) as product:
        yield product


@pytest.fixture(scope="module")
def hasty(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    """Nobody waits for longer than 3 s."""
    with _with_one_slot(binary, store, tmp_path_factory.mktemp("hasty"), 3.0) as product:
        yield product


@asynccontextmanager
async def _busy(product: Product) -> AsyncGenerator[Any]:
    """The only slot of `big` is taken; aborting the connection frees it."""
    async with connect(product.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        assert (await busy.head()).status == 200
        assert await busy.chunk()
        yield busy


async def _first_beat(product: Product, path: str, body: dict[str, Any], busy: Any) -> tuple[bytes, bytes, str]:
    """What came first, everything, and the content type; the slot is freed after the first beat."""
    async with connect(product.address) as waiting:
        await waiting.send(request_bytes("POST", path, body))
        head = await waiting.head()
        first = await waiting.chunk()
        busy.abort()
        assert first is not None
        reply = await waiting.rest(head, first)
        assert (head.status, reply.end) == (200, "complete")
        return first, reply.body, head.header("Content-Type") or ""


async def test_ndjson_is_kept_with_blanks_before_its_first_line(patient: Product) -> None:
    async with _busy(patient) as busy:
        body = {"model": "big", "messages": _HI, "options": _OPTIONS}
        first, whole, kind = await _first_beat(patient, "/api/chat", body, busy)
    assert (first, kind) == (b" ", "application/x-ndjson")
    assert [json.loads(line)["done"] for line in whole.splitlines()] == [False, False, True]


async def test_events_are_kept_with_comments(patient: Product) -> None:
    async with _busy(patient) as busy:
        body = {"model": "big", "messages": _HI, "max_tokens": 2, "stream": True}
        first, whole, kind = await _first_beat(patient, "/v1/chat/completions", body, busy)
    assert (first, kind) == (b": waiting\n\n", "text/event-stream")
    assert whole.endswith(b"data: [DONE]\n\n")


async def test_a_request_for_one_object_waits_in_silence(hasty: Product) -> None:
    async with _busy(hasty):
        body = {"model": "big", "messages": _HI, "stream": False}
        reply = await call(hasty.address, "POST", "/api/chat", body)
    assert (reply.status, reply.header("Content-Type")) == (504, "application/json; charset=utf-8")


async def test_a_client_can_switch_it_off(hasty: Product) -> None:
    async with _busy(hasty):
        body = {"model": "big", "messages": _HI}
        reply = await call(hasty.address, "POST", "/api/chat", body, (("X-Llamayard-Heartbeat", "off"),))
    assert reply.status == 504
    assert "waited" in reply.json()["error"]


async def test_an_error_after_the_first_beat_stands_in_the_stream(hasty: Product) -> None:
    async with _busy(hasty):
        lines = await call(hasty.address, "POST", "/api/chat", {"model": "big", "messages": _HI})
        assert (lines.status, lines.end) == (200, "complete")
        assert "waited" in lines.lines()[-1]["error"]
        body = {"model": "big", "messages": _HI, "stream": True}
        events = await call(hasty.address, "POST", "/v1/chat/completions", body)
        assert (events.status, events.end) == (200, "complete")
        assert "waited" in events.events()[-1]["error"]["message"]


async def test_the_packages_wait_through_it(patient: Product) -> None:
    chat: Any = ollama.AsyncClient(host=patient.address.url)
    talk: Any = openai.AsyncOpenAI(base_url=patient.address.url + "/v1", api_key="x", max_retries=0)
    async with chat as one, talk as other, _busy(patient) as busy:
        stream = asyncio.ensure_future(one.chat("big", _HI, stream=True, options=_OPTIONS))
        parts = await stream  # its head came with the first beat
        busy.abort()
        assert [part.done async for part in parts] == [False, False, True]
        async with _busy(patient) as again:
            events = await other.chat.completions.create(model="big", messages=_HI, max_tokens=2, stream=True)
            again.abort()
            words = [event.choices[0].delta.content async for event in events if event.choices]
            assert len([word for word in words if word]) == 2


async def test_the_packages_raise_a_late_error(hasty: Product) -> None:
    chat: Any = ollama.AsyncClient(host=hasty.address.url)
    talk: Any = openai.AsyncOpenAI(base_url=hasty.address.url + "/v1", api_key="x", max_retries=0)
    async with chat as one, talk as other, _busy(hasty):
        with pytest.raises(ollama.ResponseError, match="waited"):
            _ = [part async for part in await one.chat("big", _HI, stream=True)]
        with pytest.raises(openai.APIError, match="waited"):
            events = await other.chat.completions.create(model="big", messages=_HI, stream=True)
            _ = [event async for event in events]
