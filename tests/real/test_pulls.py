"""Downloads through the router: shared by all who ask, shown to all, given up when nobody waits, one at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import ModelFile, write_model_files
from tests.support.product import Product
from tests.support.rawhttp import Connection, call, connect, request_bytes
from tests.support.registry import Registry, serving
from tests.support.tiny_model import TINY
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFile]:
    specs = {f"pulled{number}": replace(TINY, seed=100 + number) for number in range(7)}
    return write_model_files(tmp_path_factory.mktemp("offered"), specs)


@pytest.fixture
async def registry(weights: Mapping[str, ModelFile]) -> AsyncGenerator[Registry]:
    async with serving() as registry:
        for name, file in weights.items():
            registry.put(name, file.path.read_bytes())
        yield registry


def _pull(registry: Registry, name: str, **fields: Any) -> bytes:
    return request_bytes("POST", "/api/pull", {"model": registry.name(name), "insecure": True, **fields})


async def _until(connection: Connection, words: str) -> list[Any]:
    """The lines up to the first whose status begins so."""
    lines: list[Any] = []
    while not (lines and lines[-1].get("status", "").startswith(words)):
        piece = await connection.chunk()
        assert piece is not None, lines
        lines += [json.loads(line) for line in piece.splitlines()]
    return lines


def _lines(chunks: tuple[bytes, ...]) -> list[Any]:
    return [json.loads(line) for line in b"".join(chunks).splitlines()]


async def test_those_who_pull_one_model_share_one_download_and_all_see_it(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as first, connect(product.address) as second, connect(product.address) as third:
        await first.send(_pull(registry, "pulled0"))
        head = await first.head()
        assert (head.status, head.header("Content-Type")) == (200, "application/x-ndjson")
        await _until(first, "pulling ")
        await registry.holding.wait()
        await second.send(_pull(registry, "PULLED0"))
        late = await second.head()
        await _until(second, "pulling ")
        await third.send(_pull(registry, "pulled0", stream=False))
        registry.gate.set()
        replies = [await first.rest(head), await second.rest(late)]
        assert [_lines(reply.chunks)[-1] for reply in replies] == [{"status": "success"}] * 2
        assert all(any("completed" in line for line in _lines(reply.chunks)) for reply in replies)
        memoise = await third.reply()
        assert (memoise.status, memoise.header("Content-Type"), memoise.json()) == (
            200,
            "application/json",
            {"status": "success"},
        )
    assert registry.asked == {"manifest": 1, "data": 2}  # weights and configuration, each once
    body = {"model": registry.name("pulled0"), "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert (await call(product.address, "POST", "/api/generate", body)).json()["eval_count"] == 2


async def test_a_download_goes_on_for_those_who_stay(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as leaving, connect(product.address) as staying:
        await leaving.send(_pull(registry, "pulled1"))
        await leaving.head()
        await registry.holding.wait()
        await staying.send(_pull(registry, "pulled1"))
        head = await staying.head()
        leaving.abort()
        registry.gate.set()
        assert _lines((await staying.rest(head)).chunks)[-1] == {"status": "success"}
    assert registry.asked["manifest"] == 1


async def test_a_download_that_nobody_waits_for_is_given_up(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as leaving:
        await leaving.send(_pull(registry, "pulled2"))
        await leaving.head()
        await registry.holding.wait()
        leaving.abort()
    reply = await call(product.address, "POST", "/api/copy", {"source": "tiny", "destination": "free-again"})
    assert reply.status == 200
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "free-again"})).status == 200
    registry.gate.set()
    again = await call(product.address, "POST", "/api/pull", {"model": registry.name("pulled2"), "insecure": True})
    assert again.lines()[-1] == {"status": "success"}


async def test_writes_wait_for_each_other_and_say_so(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    copy = {"source": "tiny", "destination": "copied-late"}
    async with connect(product.address) as first, connect(product.address) as second:
        await first.send(_pull(registry, "pulled3"))
        head = await first.head()
        await registry.holding.wait()
        await second.send(_pull(registry, "pulled4"))
        other = await second.head()
        assert (await _until(second, "waiting "))[-1]["status"].startswith("waiting for another change")
        copying = asyncio.ensure_future(call(product.address, "POST", "/api/copy", copy))
        registry.gate.set()
        assert _lines((await first.rest(head)).chunks)[-1] == {"status": "success"}
        assert _lines((await second.rest(other)).chunks)[-1] == {"status": "success"}
        assert (await copying).status == 200
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "copied-late"})).status == 200


async def test_a_registrys_refusal_is_the_servers_words_for_all(product: Product, registry: Registry) -> None:
    unknown = {"model": registry.name("nothing"), "insecure": True}
    streamed = await call(product.address, "POST", "/api/pull", unknown)
    assert (streamed.status, streamed.lines()[-1]) == (200, {"error": "pull model manifest: file does not exist"})
    memoise = await call(product.address, "POST", "/api/pull", {**unknown, "stream": False})
    assert (memoise.status, memoise.json()) == (500, {"error": "pull model manifest: file does not exist"})
    plain = await call(product.address, "POST", "/api/pull", {"model": registry.name("pulled5")})
    assert "HTTP response to HTTPS client" in plain.lines()[-1]["error"]


async def test_weights_that_a_pull_replaces_leave_the_gpus_and_the_store(
    product: Product, registry: Registry, weights: Mapping[str, ModelFile], store: Path
) -> None:
    name = registry.name("pulled6")
    await call(product.address, "POST", "/api/pull", {"model": name, "insecure": True})
    body = {"model": name, "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert (await call(product.address, "POST", "/api/generate", body)).status == 200
    old = store / "blobs" / weights["pulled6"].digest.replace(":", "-")
    assert old.is_file()
    registry.put("pulled6", weights["pulled5"].path.read_bytes())
    assert (await call(product.address, "POST", "/api/pull", {"model": name, "insecure": True})).status == 200
    await eventually(lambda: not old.exists(), what="the end of the old weights")
    await eventually(lambda: not any("pulled6" in n for names in product.resident().values() for n in names))
    assert not any("llamayard" in model["name"] for model in product.call("GET", "/api/tags")[1]["models"])
    assert (await call(product.address, "POST", "/api/generate", body)).status == 200
