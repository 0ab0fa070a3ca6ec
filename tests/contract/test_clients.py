"""Clients that leave, half-close or come back: what becomes of their requests and of the slot."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import pytest

from tests.contract.conftest import Start
from tests.contract.stage import Stage, furnish
from tests.support.ollama_server import ModelFile
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually

_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


@pytest.fixture(scope="module")
def single(start: Start, tmp_path_factory: pytest.TempPathFactory, files: Mapping[str, ModelFile]) -> Generator[Stage]:
    """A server with one slot a model."""
    with start(tmp_path_factory.mktemp("single"), OLLAMA_NUM_PARALLEL="1") as server:
        yield furnish(server, files)


async def test_a_client_that_hangs_up_within_a_stream_frees_its_slot(single: Stage) -> None:
    single.load("big")
    async with connect(single.server.address) as leaving:
        await leaving.send(request_bytes("POST", "/api/generate", _LONG))
        await leaving.head()
        assert await leaving.chunk()
        leaving.abort()
    reply = await call(single.server.address, "POST", "/api/generate", _SHORT)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


async def test_a_half_closed_client_counts_as_gone(single: Stage) -> None:
    single.load("big")
    async with connect(single.server.address) as leaving:
        await leaving.send(request_bytes("POST", "/api/generate", _LONG))
        head = await leaving.head()
        assert await leaving.chunk()
        leaving.half_close()
        reply = await leaving.rest(head)
        assert b'"done":true' not in reply.body
    assert (await call(single.server.address, "POST", "/api/generate", _SHORT)).status == 200


async def test_a_client_that_waits_for_a_slot_may_leave(single: Stage) -> None:
    single.load("big")
    async with connect(single.server.address) as busy, connect(single.server.address) as leaving:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        await busy.head()
        await leaving.send(request_bytes("POST", "/api/generate", _SHORT))
        leaving.abort()
        assert await busy.chunk()
        busy.abort()
    assert (await call(single.server.address, "POST", "/api/generate", _SHORT)).status == 200


async def test_a_busy_model_is_unloaded_after_its_stream(single: Stage) -> None:
    single.load("big", keep_alive="10m")
    async with connect(single.server.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", _LONG))
        await busy.head()
        reply = await call(single.server.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
        assert reply.json()["done_reason"] == "unload"
        assert list(single.loaded()) == ["big:latest"]
        assert await busy.chunk()
        busy.abort()
    await eventually(lambda: not single.loaded())


async def test_two_slots_serve_two_streams_at_once(start: Start, single: Stage) -> None:
    folder = single.server.models_dir.parent
    with start(folder, OLLAMA_NUM_PARALLEL="2") as server:
        async with connect(server.address) as first, connect(server.address) as second:
            for connection in (first, second):
                await connection.send(request_bytes("POST", "/api/generate", _LONG))
            for connection in (first, second):
                assert (await connection.head()).status == 200
                assert await connection.chunk()
            assert await first.chunk()


async def test_a_client_that_leaves_during_its_load_aborts_it(single: Stage) -> None:
    """Tried until it was quicker than the load."""

    async def aborted() -> bool:
        single.unload_all()
        async with connect(single.server.address) as leaving:
            await leaving.send(request_bytes("POST", "/api/generate", {"model": "big"}))
            await eventually(single.server.runners)
            leaving.abort()
        try:
            return await eventually(lambda: not single.loaded() and not single.server.runners(), deadline_seconds=2)
        except AssertionError:
            return False

    await eventually(aborted)
