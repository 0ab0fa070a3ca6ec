"""Waiting for a load, required layouts and fallbacks, on emulated GPUs and servers of 0.24.0."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call, connect, request_bytes
from tests.support.sparse_model import LLAMA_8B, LLAMA_70B, LLAMA_405B, put_into_store

pytestmark = pytest.mark.rig

_HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    config = {
        "log": {"format": "json"},
        "stream": {"heartbeat_seconds": 0.2},
        "fallbacks": {"huge": {"to": ["small"], "reasons": ["too_large"]}},
        "poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2},
    }
    speed = {"LLAMAYARD_RIG_SPEED": "4"}
    with running(prepare(tmp_path_factory.mktemp("rig"), config, speed, ("--rig", "2x3090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "small", LLAMA_8B)
        put_into_store(Path(store), "seventy", LLAMA_70B)
        put_into_store(Path(store), "huge", LLAMA_405B)
        yield router


async def _cold_request(product: Product, path: str, body: dict[str, Any]) -> tuple[bytes, Reply]:
    """Sends a request that waits for a load; returns its first bytes and the whole response."""
    async with connect(product.address) as waiting:
        await waiting.send(request_bytes("POST", path, {"model": "seventy", "messages": _HI, **body}))
        head = await waiting.head()
        first = await waiting.chunk()
        assert first is not None
        return first, await waiting.rest(head, first)


async def _unload(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "seventy", "keep_alive": 0})


async def test_anthropic_streams_get_pings_while_a_model_loads(product: Product) -> None:
    first, reply = await _cold_request(product, "/v1/messages", {"max_tokens": 3, "stream": True})
    assert first == b'event: ping\ndata: {"type": "ping"}\n\n'
    assert (reply.status, reply.end, reply.events()[-1]) == (200, "complete", {"type": "message_stop"})
    await _unload(product)


async def test_responses_streams_get_comments_while_a_model_loads(product: Product) -> None:
    async with connect(product.address) as waiting:
        body = {"model": "seventy", "input": "hi", "max_output_tokens": 3, "stream": True}
        await waiting.send(request_bytes("POST", "/v1/responses", body))
        reply = await waiting.rest(await waiting.head())
    assert reply.chunks[0] == b": waiting\n\n"
    assert reply.events()[-1]["type"] == "response.completed"
    await _unload(product)


async def _small_request(product: Product, layout: str) -> Reply:
    body = {"model": "small", "messages": _HI, "stream": False, "options": {"num_predict": 2}}
    return await call(product.address, "POST", "/api/chat", body, (("X-Llamayard-Layout", layout),))


async def test_a_request_is_served_in_its_required_layout(product: Product) -> None:
    uuids = {gpu["index"]: gpu["uuid"] for gpu in product.call("GET", "/llamayard/status")[1]["gpus"]}
    for layout, instance in (("gpu:1", "gpu1"), (f"gpu:{uuids[0]}", "gpu0"), ("spread", "spread")):
        reply = await _small_request(product, layout)
        assert (reply.status, reply.header("X-Llamayard-Instance")) == (200, instance), reply.body


async def test_an_unknown_layout_is_refused_with_the_list_of_gpus(product: Product) -> None:
    reply = await _small_request(product, "gpu:7")
    assert (reply.status, reply.header("X-Llamayard-Error")) == (409, "layout_unavailable")
    assert "GPU-" in reply.json()["error"]


async def test_a_layout_too_small_for_the_model_is_refused_with_the_reason(product: Product) -> None:
    body = {"model": "seventy", "messages": _HI, "stream": False}
    reply = await call(product.address, "POST", "/api/chat", body, (("X-Llamayard-Layout", "single"),))
    assert (reply.status, reply.header("X-Llamayard-Error")) == (409, "layout_unavailable"), reply.body


async def test_a_model_that_fits_nowhere_is_replaced_by_its_fallback(product: Product) -> None:
    reply = await call(product.address, "POST", "/v1/chat/completions", {"model": "huge", "messages": _HI})
    assert (reply.status, reply.json()["model"]) == (200, "small"), reply.body
    assert (reply.header("X-Llamayard-Model"), reply.header("X-Llamayard-Fallback")) == ("small", "too_large")
