"""Prompts longer than the default context, on emulated GPUs and servers: they are read whole where that fits."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.sparse_model import LLAMA_8B, LLAMA_70B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_LONG = "a prompt of an agent, with tools and rules. " * 2500
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _LONG}], "max_tokens": 2},
    "/v1/completions": {"prompt": _LONG, "max_tokens": 2},
    "/v1/responses": {"input": _LONG, "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": _LONG}], "max_tokens": 2},
    "/api/chat": {"messages": [{"role": "user", "content": _LONG}], "options": {"num_predict": 2}, "stream": False},
    "/api/generate": {"prompt": _LONG, "options": {"num_predict": 2}, "stream": False},
}
_COUNTS = ("prompt_tokens", "input_tokens", "prompt_eval_count")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    config = {"log": {"format": "json"}, "poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}
    with running(
        prepare(tmp_path_factory.mktemp("rig"), config, {"LLAMAYARD_RIG_SPEED": "50"}, ("--rig", "2x3090"))
    ) as it:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in it.servers().values()}
        put_into_store(Path(store), "small", LLAMA_8B)
        put_into_store(Path(store), "seventy", LLAMA_70B)
        yield it


async def _unload(product: Product, model: str) -> None:
    await call(product.address, "POST", "/api/generate", {"model": model, "keep_alive": 0})
    await eventually(lambda: not any(product.resident().values()), what="nothing loaded")


async def _ask(product: Product, path: str, model: str) -> Reply:
    return await call(product.address, "POST", path, {"model": model, **_BODIES[path]})


def _prompt_tokens(reply: Reply) -> int:
    counts = {**reply.json(), **reply.json().get("usage", {})}
    return next(counts[name] for name in _COUNTS if name in counts)


@pytest.mark.parametrize("path", _BODIES)
async def test_a_prompt_of_an_agent_is_read_whole_and_short_ones_share_its_replica(product: Product, path: str) -> None:
    await _unload(product, "small")
    reply = await _ask(product, path, "small")
    assert reply.status == 200, reply.body
    assert _prompt_tokens(reply) > 20_000
    assert reply.header("X-Llamayard-Context") is None
    rows = product.call("GET", "/api/ps")[1]["models"]
    assert [row["context_length"] for row in rows] == [65_536]
    servers = product.resident()
    messages = [{"role": "user", "content": "a title, please"}]
    for other in ("/v1/chat/completions", "/api/chat") if path.startswith("/v1") else ("/api/chat",):
        short = await call(product.address, "POST", other, {"model": "small", "messages": messages, "stream": False})
        assert short.header("X-Llamayard-Instance") == reply.header("X-Llamayard-Instance")
    again = await _ask(product, path, "small")
    assert again.header("X-Llamayard-Instance") == reply.header("X-Llamayard-Instance")
    assert product.resident() == servers
    assert [row["context_length"] for row in product.call("GET", "/api/ps")[1]["models"]] == [65_536]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_where_the_gpus_do_not_bear_it_the_reply_and_the_log_say_so(product: Product, path: str) -> None:
    await _unload(product, "small")
    reply = await _ask(product, path, "seventy")
    assert reply.status == 200, reply.body
    assert reply.header("X-Llamayard-Context") == "8192"
    assert _prompt_tokens(reply) <= 8192
    lines = [json.loads(line) for line in product.log_text().splitlines() if "prompt_exceeds_context" in line]
    assert (lines[-1]["level"], lines[-1]["model"], lines[-1]["context_length"]) == ("warning", "seventy:latest", 8192)
    await _unload(product, "seventy")
