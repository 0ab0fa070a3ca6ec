"""Many concurrent streams on both servers, and clients that disconnect."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.support.product import Product
from tests.support.rawhttp import Reply, call, connect, request_bytes
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama

_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


async def test_thirty_two_streams_over_two_models_on_two_servers(product: Product) -> None:
    for name in ("tiny", "other", "short", "big", "embed"):
        await call(product.address, "POST", "/api/generate", {"model": name, "keep_alive": 0})
    await eventually(lambda: not product.call("GET", "/llamayard/status")[1]["models"], what="no models in the status")
    assert not any(product.resident().values())

    async def stream(number: int) -> Reply:
        model = ("tiny", "other")[number % 2]
        body = {"model": model, "prompt": f"hello {number}", "options": {"num_predict": 40, "seed": number}}
        return await call(product.address, "POST", "/api/generate", body)

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(stream(number)) for number in range(32)]
    replies = [task.result() for task in running]
    assert Counter(reply.status for reply in replies) == {200: 32}
    assert all(reply.end == "complete" and reply.lines()[-1]["done"] for reply in replies)
    assert all(len(reply.lines()) == 41 for reply in replies)
    assert Counter(reply.lines()[0]["model"] for reply in replies) == {"tiny": 16, "other": 16}
    assert sorted(product.resident().values()) == [["other:latest"], ["tiny:latest"]]


async def test_two_requests_for_a_cold_model_cause_one_load(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
    await eventually(lambda: not any("big:latest" in names for names in product.resident().values()))
    replies = await asyncio.gather(*(call(product.address, "POST", "/api/generate", _SHORT) for _ in range(4)))
    assert [reply.status for reply in replies] == [200] * 4
    assert sum("big:latest" in names for names in product.resident().values()) == 1


async def test_a_client_that_disconnects_frees_its_slot(product: Product) -> None:
    """Both slots of the model are held by clients that disconnect; then a third request is served."""
    await call(product.address, "POST", "/api/generate", _SHORT)
    async with connect(product.address) as first, connect(product.address) as second:
        for disconnecting in (first, second):
            await disconnecting.send(request_bytes("POST", "/api/generate", _LONG))
            assert (await disconnecting.head()).status == 200
            assert await disconnecting.chunk()
        queued_request = asyncio.ensure_future(call(product.address, "POST", "/api/generate", _SHORT))
        assert await first.chunk()
        first.abort()
        second.abort()
    reply = await queued_request
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


async def test_clients_that_disconnect_while_queued_leak_no_slots(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", _SHORT)
    async with connect(product.address) as first, connect(product.address) as second:
        for busy in (first, second):
            await busy.send(request_bytes("POST", "/api/generate", _LONG))
            await busy.head()
        for _ in range(5):
            async with connect(product.address) as disconnecting:
                await disconnecting.send(request_bytes("POST", "/api/generate", _SHORT))
                disconnecting.abort()
        assert await first.chunk()
        first.abort()
        second.abort()
    replies = await asyncio.gather(*(call(product.address, "POST", "/api/generate", _SHORT) for _ in range(3)))
    assert [reply.status for reply in replies] == [200] * 3


async def test_a_client_that_disconnects_during_a_load_does_not_abort_it(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
    await eventually(lambda: not any("big:latest" in names for names in product.resident().values()))
    async with connect(product.address) as disconnecting:
        await disconnecting.send(request_bytes("POST", "/api/generate", _LONG))
        disconnecting.abort()
    reply = await call(product.address, "POST", "/api/generate", _SHORT)
    assert (reply.status, reply.json()["eval_count"]) == (200, 2)


@pytest.mark.parametrize("keep_alive", [0, "0s"])
async def test_a_client_can_unload_a_model(product: Product, keep_alive: int | str) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "tiny"})
    reply = await call(product.address, "POST", "/api/generate", {"model": "tiny", "keep_alive": keep_alive})
    assert (reply.status, reply.json()["done_reason"]) == (200, "unload")
    await eventually(lambda: not any("tiny:latest" in names for names in product.resident().values()))


async def test_a_keep_alive_of_a_second_is_honoured(product: Product) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": False, "keep_alive": "1s", "options": {"num_predict": 2}}
    assert (await call(product.address, "POST", "/api/generate", body)).status == 200
    await eventually(lambda: not any("tiny:latest" in names for names in product.resident().values()))
