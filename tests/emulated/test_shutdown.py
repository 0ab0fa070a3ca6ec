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
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.rig

_LONG = {"model": "endless", "max_tokens": 5000, "stream": True, "messages": [{"role": "user", "content": "x"}]}
_AT_ONCE = "a second signal stopped it at once"
_LIMIT = "server.drain_timeout_seconds (1 s)"


def _product(folder: Path, drain_timeout_seconds: float = 1.0) -> Product:
    config = {
        "server": {"drain_timeout_seconds": drain_timeout_seconds}, "ollama": {"num_parallel": 4},
        "log": {"format": "json"},
    }  # fmt: skip
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


async def test_a_second_signal_ends_each_request_with_an_error_that_says_so(tmp_path: Path) -> None:
    with running(_product(tmp_path, drain_timeout_seconds=600.0)) as product:
        _add_endless(product)
        short = {**_LONG, "max_tokens": 1, "stream": False}
        assert (await call(product.address, "POST", "/v1/chat/completions", short)).status == 200
        native, whole = {**_LONG, "options": {"num_predict": 5000}}, {**_LONG, "stream": False}
        async with (
            connect(product.address) as ollama,
            connect(product.address) as openai,
            connect(product.address) as waiting,
        ):
            await _begin(ollama, "/api/chat", native)
            await _begin(openai, "/v1/chat/completions", _LONG)
            await waiting.send(request_bytes("POST", "/v1/chat/completions", whole))
            await asyncio.to_thread(_until_busy, product, 3)
            product.signal(signal.SIGINT)
            await eventually(lambda: "draining" in product.log_text(), what="the drain")
            product.signal(signal.SIGINT)
            streams = await asyncio.gather(*(each.rest_after_head() for each in (ollama, openai)))
            reply = await waiting.reply()
        assert [stream.end for stream in streams] == ["complete"] * 2
        assert _AT_ONCE in streams[0].lines()[-1]["error"]
        assert _AT_ONCE in json.loads(streams[1].body.rpartition(b"data: ")[2])["error"]["message"]
        assert (reply.status, reply.header("X-Llamayard-Error")) == (503, "shutting_down")
        assert product.wait() == 0
        entries = [json.loads(line) for line in product.log_text().splitlines() if line.startswith("{")]
        ended = [entry for entry in entries if entry.get("error") == "shutting_down"]
        assert sorted(entry["status"] for entry in ended) == [200, 200, 503]
        assert not [entry for entry in entries if entry.get("status") == 499]


async def test_a_pull_that_a_second_signal_cuts_off_says_so(tmp_path: Path) -> None:
    with running(_product(tmp_path, drain_timeout_seconds=600.0)) as product:
        async with connect(product.address) as pull:
            await _begin(pull, "/api/pull", {"model": "llama3.3:70b-instruct-fp16"})
            product.signal(signal.SIGINT)
            await eventually(lambda: "draining" in product.log_text(), what="the drain")
            product.signal(signal.SIGINT)
            reply = await pull.rest_after_head()
        assert (reply.end, _AT_ONCE in reply.lines()[-1]["error"]) == ("complete", True), reply.lines()[-1]
        assert product.wait() == 0


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


def _until_busy(product: Product, requests: int = 1) -> None:
    def is_busy() -> bool:
        models = product.call("GET", "/llamayard/status")[1]["models"]
        return sum(row["in_flight"] for row in models) >= requests

    eventually_sync(is_busy, what="a request in progress")
