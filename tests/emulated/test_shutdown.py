"""A drain that reaches its deadline: what clients see of it, on every route and in every phase of a request."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Connection, call, connect, request_bytes
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

_LONG = {"model": "endless", "max_tokens": 5000, "stream": True, "messages": [{"role": "user", "content": "x"}]}
_LIMIT = "server.drain_timeout_seconds (1 s)"


def _product(folder: Path) -> Product:
    config = {"server": {"drain_timeout_seconds": 1.0}, "ollama": {"num_parallel": 4}}
    return prepare(folder, config, {"LLAMAYARD_RIG_SPEED": "2"}, ("--rig", "3090"))


def _add_endless(product: Product) -> None:
    """A model whose answers have no end: with so small a vocabulary the emulator generates noise."""
    (server,) = product.servers().values()
    put_into_store(Path(server.environ()["OLLAMA_MODELS"]), "endless", replace(LLAMA_8B, vocabulary=64))


async def _begin(connection: Connection, path: str, body: Any) -> None:
    await connection.send(request_bytes("POST", path, body))
    assert (await connection.head()).status == 200
    assert await connection.chunk()


async def test_a_stream_that_outlasts_the_drain_says_why_it_ends(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        _add_endless(product)
        short = {**_LONG, "max_tokens": 1, "stream": False}
        assert (await call(product.address, "POST", "/v1/chat/completions", short)).status == 200
        native = {**_LONG, "options": {"num_predict": 5000}}
        async with (
            connect(product.address) as ollama,
            connect(product.address) as openai,
            connect(product.address) as anthropic,
        ):
            await _begin(ollama, "/api/chat", native)
            await _begin(openai, "/v1/chat/completions", _LONG)
            await _begin(anthropic, "/v1/messages", _LONG)
            product.signal(signal.SIGTERM)
            replies = await asyncio.gather(*(each.rest_after_head() for each in (ollama, openai, anthropic)))
        assert [reply.end for reply in replies] == ["complete"] * 3
        assert _LIMIT in replies[0].lines()[-1]["error"]
        last = [json.loads(reply.body.rpartition(b"data: ")[2]) for reply in replies[1:]]
        assert all(_LIMIT in each["error"]["message"] for each in last)
        assert b"died" not in b"".join(reply.body for reply in replies)
        assert product.wait() == 0
        assert product.log_text().count("shutting_down") == 3
        assert "its runner died" not in product.log_text()


async def test_a_response_that_has_not_begun_gets_503(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        _add_endless(product)
        whole = {**_LONG, "stream": False}
        assert (await call(product.address, "POST", "/v1/chat/completions", {**whole, "max_tokens": 1})).status == 200
        async with connect(product.address) as connection:
            await connection.send(request_bytes("POST", "/v1/chat/completions", whole))
            await asyncio.to_thread(_until_busy, product)
            product.signal(signal.SIGTERM)
            reply = await connection.reply()
        assert (reply.status, reply.header("Retry-After")) == (503, "5")
        assert reply.header("X-Llamayard-Error") == "shutting_down"
        assert _LIMIT in reply.json()["error"]["message"]
        assert product.wait() == 0


def _until_busy(product: Product) -> None:
    def is_busy() -> bool:
        return any(row["in_flight"] for row in product.call("GET", "/llamayard/status")[1]["models"])

    eventually_sync(is_busy, what="a request in progress")
