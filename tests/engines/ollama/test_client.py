"""The client of one server: what it sends, and that no failure looks like a result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.domain.events import LoadedModel
from router.engines.ollama.client import TIMED_OUT, UNREACHABLE, OllamaClient, OllamaError
from router.engines.ollama.http_get import KeptConnections
from tests.support.scripted_server import failing, hanging, scripted
from tests.support.waiting import eventually

RECORDED = Path(__file__).parents[2] / "contract" / "recordings" / "0.24.0"


def recorded(name: str) -> Any:
    """A recorded answer of a real 0.24.0."""
    answer = json.loads((RECORDED / f"{name}.json").read_text("utf-8"))["response"]
    text = answer.get("body") or "".join(text for _, text in answer["chunks_ms_text"] if text)
    return json.loads(text)


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def _failure(call: Any) -> OllamaError:
    with pytest.raises(OllamaError) as refusal:
        await call
    return refusal.value


async def test_what_a_real_server_lists_is_read(session: aiohttp.ClientSession) -> None:
    answers = {"/api/version": {"version": "0.24.0"}, "/api/tags": recorded("tags"), "/api/ps": recorded("ps-loaded")}
    async with scripted(answers) as server:
        client = OllamaClient(session, server.url + "/")
        assert client.base_url == server.url
        assert await client.version() == "0.24.0"
        assert [(tag.name, tag.size) for tag in await client.tags()] == [
            ("big:latest", 103_107_203), ("embed:latest", 300_447), ("tiny:latest", 366_113),
        ]  # fmt: skip
        digest = "535123857fd8307b4ba96c9a302598ba75ba8901b9f8ba745bd6f3e5ada8d7f1"
        assert await client.ps() == (LoadedModel("tiny:latest", digest, 1_296_000, 0, 4096),)


async def test_a_store_without_models_is_empty_however_that_is_written(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/tags": {"models": None}, "/api/ps": {"models": []}}) as server:
        client = OllamaClient(session, server.url)
        assert await client.tags() == ()
        assert await client.ps() == ()


async def test_facts_are_asked_for_with_arrays_only_on_demand(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/show": recorded("show")}) as server:
        client = OllamaClient(session, server.url)
        reply = await client.show("tiny")
        assert reply.tensors is not None
        assert (reply.tensors[0].name, reply.tensors[0].type, reply.tensors[0].shape) == (
            "token_embd.weight", "F16", (64, 771),
        )  # fmt: skip
        await client.show("tiny", verbose=True)
        assert [request.body for request in server.requests] == [{"model": "tiny"}, {"model": "tiny", "verbose": True}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"models":5}',
        b"[" * 100_000,
        b'{"models":[{"name":"\xff"}]}',
        b'{"models":[{"name":"a"}]}',
        b'"x"',
        b"{}",
    ],
)
async def test_a_list_that_cannot_be_read_is_an_error_and_not_an_empty_list(
    session: aiohttp.ClientSession, body: bytes
) -> None:
    async with scripted({"/api/ps": failing(200, body)}) as server:
        error = await _failure(OllamaClient(session, server.url).ps())
        assert error.status == UNREACHABLE
        assert "GET " in error.message
        assert "/api/ps: unreadable answer" in error.message


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (500, b"", "status 500 without an error message"),
        (404, b'{"error":"model \'x\' not found"}', "model 'x' not found"),
        (503, b"<html>", "status 503 without an error message"),
    ],
)
async def test_a_refusal_keeps_the_servers_status_and_message(
    session: aiohttp.ClientSession, status: int, body: bytes, words: str
) -> None:
    async with scripted({"/api/ps": failing(status, body), "/api/show": failing(status, body)}) as server:
        client = OllamaClient(session, server.url)
        for call in (client.ps(), client.show("x")):
            error = await _failure(call)
            assert error.status == status
            assert words in error.message


async def test_an_error_with_status_200_is_an_error(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/generate": {"error": "llama runner process has terminated"}}) as server:
        error = await _failure(OllamaClient(session, server.url).load("a", {}, embedding=False, timeout_seconds=5))
        assert (error.status, error.message) == (500, "llama runner process has terminated")


async def test_a_call_ends_at_its_deadline_and_disconnects(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/ps": lambda _: hanging(), "/api/generate": lambda _: hanging()}) as server:
        client = OllamaClient(session, server.url, timeout_seconds=1.0)
        listing, loading, unloading = await asyncio.gather(
            _failure(client.ps()),
            _failure(client.load("a", {}, embedding=False, timeout_seconds=1.0)),
            _failure(client.unload("a", timeout_seconds=1.0)),
        )
        assert "/api/ps: no answer within 1 s" in listing.message
        assert (loading.status, unloading.status) == (TIMED_OUT, TIMED_OUT)
        await eventually(lambda: len(server.hung_up) == 3)


async def test_a_server_that_is_not_there_is_an_error(session: aiohttp.ClientSession) -> None:
    async with scripted({}) as server:
        gone = server.url
    error = await _failure(OllamaClient(session, gone).version())
    assert error.status == UNREACHABLE
    assert gone in error.message


async def test_a_lost_connection_is_an_error(session: aiohttp.ClientSession) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        error = await _failure(OllamaClient(session, f"http://127.0.0.1:{port}").tags())
        assert error.status == UNREACHABLE


async def test_a_load_requests_all_layers_and_keep_alive_for_ever(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/generate": {"done": True, "done_reason": "load"}}) as server:
        client = OllamaClient(session, server.url)
        await client.load("tiny", {"num_ctx": 2048}, embedding=False, timeout_seconds=5, num_gpu=3)
        await client.load("tiny", {}, embedding=False, timeout_seconds=5)
        assert [request.body for request in server.requests] == [
            {"model": "tiny", "keep_alive": -1, "stream": False, "options": {"num_ctx": 2048, "num_gpu": 3}},
            {"model": "tiny", "keep_alive": -1, "stream": False},
        ]


async def test_an_embedding_model_is_loaded_through_embed_and_unloaded_through_generate(
    session: aiohttp.ClientSession,
) -> None:
    async with scripted({"/api/embed": {"embeddings": []}, "/api/generate": {"done_reason": "unload"}}) as server:
        client = OllamaClient(session, server.url)
        await client.load("embed", {}, embedding=True, timeout_seconds=5, num_gpu=3)
        await client.unload("embed")
        assert [(request.path, request.body) for request in server.requests] == [
            ("/api/embed", {"model": "embed", "keep_alive": -1, "options": {"num_gpu": 3}}),
            ("/api/generate", {"model": "embed", "keep_alive": 0, "stream": False}),
        ]


async def test_lists_over_kept_connections_are_read_and_fail_as_over_the_session(
    session: aiohttp.ClientSession,
) -> None:
    kept = KeptConnections()
    async with scripted({"/api/tags": recorded("tags"), "/api/ps": lambda _: hanging()}) as server:
        raw, library = (OllamaClient(session, server.url, 0.5, lists) for lists in (kept, None))
        assert await raw.tags() == await raw.tags() == await library.tags()
        for client in (raw, library):
            hung = await _failure(client.ps())
            assert (hung.status, "/api/ps: no answer within 0.5 s" in hung.message) == (TIMED_OUT, True)
            missing = await _failure(client.version())
            assert (missing.status, missing.message) == (
                404, f"GET {server.url}/api/version: status 404 without an error message",
            )  # fmt: skip
        assert len({request.port for request in server.requests[:2]}) == 1
    gone = await _failure(raw.tags())
    assert (gone.status, server.url in gone.message) == (UNREACHABLE, True)
    kept.close()


async def test_loads_have_connections_of_their_own_and_lists_share_one(session: aiohttp.ClientSession) -> None:
    answers = {"/api/generate": {"done": True}, "/api/ps": {"models": []}}
    async with scripted(answers) as server:
        client = OllamaClient(session, server.url)
        for _ in range(2):
            await client.ps()
            await client.load("a", {}, embedding=False, timeout_seconds=5)
        ports = {path: [request.port for request in server.requests if request.path == path] for path in answers}
        assert len(set(ports["/api/ps"])) == 1
        assert len({*ports["/api/generate"], *ports["/api/ps"]}) == 3


async def test_cancelling_a_load_closes_its_connection(session: aiohttp.ClientSession) -> None:
    async with scripted({"/api/generate": lambda _: hanging()}) as server:
        client = OllamaClient(session, server.url)
        load = asyncio.ensure_future(client.load("a", {}, embedding=False, timeout_seconds=60))
        await eventually(lambda: server.requests)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        await eventually(lambda: server.hung_up == ["/api/generate"])
