"""Clients that disconnect, half-close or reconnect: what happens to their requests and slots."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping

import aiohttp
import pytest

from router.engines.ollama.client import OllamaClient
from tests.contract.conftest import Start
from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually

_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


@pytest.fixture(scope="module")
def one_slot(
    start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]
) -> Generator[Stage]:
    """A server with one slot per model."""
    with start(tmp_path_factory.mktemp("single"), OLLAMA_NUM_PARALLEL="1") as server:
        yield create_models(server, files)


async def test_a_client_that_disconnects_mid_stream_frees_its_slot(one_slot: Stage) -> None:
    one_slot.load("big")
    async with connect(one_slot.server.address) as disconnecting:
        await disconnecting.send(request_bytes("POST", "/api/generate", _LONG))
        await disconnecting.head()
        assert await disconnecting.chunk()
        disconnecting.abort()
    reply = await call(one_slot.server.address, "POST", "/api/generate", _SHORT)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


async def test_a_half_closed_client_counts_as_disconnected(one_slot: Stage) -> None:
    one_slot.load("big")
    async with connect(one_slot.server.address) as disconnecting:
        await disconnecting.send(request_bytes("POST", "/api/generate", _LONG))
        head = await disconnecting.head()
        assert await disconnecting.chunk()
        disconnecting.half_close()
        reply = await disconnecting.rest(head)
        assert b'"done":true' not in reply.body
    assert (await call(one_slot.server.address, "POST", "/api/generate", _SHORT)).status == 200


async def test_a_client_may_disconnect_while_waiting_for_a_slot(one_slot: Stage) -> None:
    one_slot.load("big")
    async with connect(one_slot.server.address) as busy, connect(one_slot.server.address) as disconnecting:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        await busy.head()
        await disconnecting.send(request_bytes("POST", "/api/generate", _SHORT))
        disconnecting.abort()
        assert await busy.chunk()
        busy.abort()
    assert (await call(one_slot.server.address, "POST", "/api/generate", _SHORT)).status == 200


async def test_a_busy_model_is_unloaded_after_its_stream(one_slot: Stage) -> None:
    one_slot.load("big", keep_alive="10m")
    async with connect(one_slot.server.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        await busy.head()
        reply = await call(one_slot.server.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
        assert reply.json()["done_reason"] == "unload"
        assert list(one_slot.loaded()) == ["big:latest"]
        assert await busy.chunk()
        busy.abort()
    await eventually(lambda: not one_slot.loaded())


async def test_two_slots_serve_two_streams_concurrently(start: Start, one_slot: Stage) -> None:
    folder = one_slot.server.models_dir.parent
    with start(folder, OLLAMA_NUM_PARALLEL="2") as server:
        async with connect(server.address) as first, connect(server.address) as second:
            for connection in (first, second):
                await connection.send(request_bytes("POST", "/api/generate", _LONG))
            for connection in (first, second):
                assert (await connection.head()).status == 200
                assert await connection.chunk()
            assert await first.chunk()


async def test_a_client_that_disconnects_during_its_load_aborts_it(one_slot: Stage) -> None:
    """Retries until the disconnect comes before the end of the load."""

    async def aborted() -> bool:
        one_slot.unload_all()
        async with connect(one_slot.server.address) as disconnecting:
            await disconnecting.send(request_bytes("POST", "/api/generate", {"model": "big"}))
            await eventually(one_slot.server.runners)
            disconnecting.abort()
        try:
            return await eventually(lambda: not one_slot.loaded() and not one_slot.server.runners(), deadline_seconds=2)
        except AssertionError:
            return False

    await eventually(aborted)


async def test_a_load_that_the_router_breaks_off_ends_and_the_model_can_be_unloaded_at_once(one_slot: Stage) -> None:
    """As the driver does it: the call of the load is cancelled, and the unload sent without a pause."""
    one_slot.unload_all()
    async with aiohttp.ClientSession() as session:
        client = OllamaClient(session, one_slot.server.url)
        loading = asyncio.ensure_future(client.load("big", {}, embedding=False, timeout_seconds=60.0))
        await eventually(one_slot.server.runners)
        loading.cancel()
        await client.unload("big", timeout_seconds=30.0)
        await eventually(lambda: not one_slot.loaded() and not one_slot.server.runners())
        await client.load("big", {}, embedding=False, timeout_seconds=60.0)
    assert list(one_slot.loaded()) == ["big:latest"]
