"""Downloads through the router: shared between clients, cancelled when nobody waits, one at a time."""

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


async def _until(connection: Connection, status: str, key: str = "status") -> list[Any]:
    """Reads lines up to the first that has the key and whose status starts with `status`."""
    lines: list[Any] = []
    while not (lines and key in lines[-1] and lines[-1].get("status", "").startswith(status)):
        piece = await connection.chunk()
        assert piece is not None, lines
        lines += [json.loads(line) for line in piece.splitlines()]
    return lines


def _lines(chunks: tuple[bytes, ...]) -> list[Any]:
    return [json.loads(line) for line in b"".join(chunks).splitlines()]


async def test_concurrent_pulls_of_one_model_share_one_download(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as first, connect(product.address) as second, connect(product.address) as third:
        await first.send(_pull(registry, "pulled0"))
        head = await first.head()
        assert (head.status, head.header("Content-Type")) == (200, "application/x-ndjson")
        await _until(first, "pulling ")
        await registry.download_started.wait()
        await second.send(_pull(registry, "PULLED0"))
        second_head = await second.head()
        for connection in (first, second):
            await _until(connection, "pulling ", "total")
        (row,) = product.call("GET", "/llamayard/status")[1]["pulls"]
        assert row["model"] == registry.name("pulled0").removeprefix("http://") + ":latest"
        assert row["status"].startswith("pulling ")
        assert (row["completed_bytes"], row["clients"]) == (0, 2)
        assert row["total_bytes"] > 0
        await third.send(_pull(registry, "pulled0", stream=False))
        registry.gate.set()
        replies = [await first.rest(head), await second.rest(second_head)]
        assert [_lines(reply.chunks)[-1] for reply in replies] == [{"status": "success"}] * 2
        unstreamed = await third.reply()
        assert (unstreamed.status, unstreamed.header("Content-Type"), unstreamed.json()) == (
            200,
            "application/json",
            {"status": "success"},
        )
    assert product.call("GET", "/llamayard/status")[1]["pulls"] == []
    assert registry.request_counts == {"manifest": 1, "data": 2}  # weights and configuration, once each
    body = {"model": registry.name("pulled0"), "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert (await call(product.address, "POST", "/api/generate", body)).json()["eval_count"] == 2


async def test_a_download_continues_for_the_remaining_clients(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as disconnecting, connect(product.address) as staying:
        await disconnecting.send(_pull(registry, "pulled1"))
        await disconnecting.head()
        await registry.download_started.wait()
        await staying.send(_pull(registry, "pulled1"))
        head = await staying.head()
        disconnecting.abort()
        registry.gate.set()
        assert _lines((await staying.rest(head)).chunks)[-1] == {"status": "success"}
    assert registry.request_counts["manifest"] == 1


async def test_a_download_without_clients_is_cancelled(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    async with connect(product.address) as disconnecting:
        await disconnecting.send(_pull(registry, "pulled2"))
        await disconnecting.head()
        await registry.download_started.wait()
        disconnecting.abort()
    reply = await call(product.address, "POST", "/api/copy", {"source": "tiny", "destination": "free-again"})
    assert reply.status == 200
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "free-again"})).status == 200
    registry.gate.set()
    again = await call(product.address, "POST", "/api/pull", {"model": registry.name("pulled2"), "insecure": True})
    assert again.lines()[-1] == {"status": "success"}


async def test_store_changes_wait_for_each_other_and_report_it(product: Product, registry: Registry) -> None:
    registry.gate.clear()
    copy = {"source": "tiny", "destination": "copied-late"}
    async with connect(product.address) as first, connect(product.address) as second:
        await first.send(_pull(registry, "pulled3"))
        head = await first.head()
        await registry.download_started.wait()
        await second.send(_pull(registry, "pulled4"))
        second_head = await second.head()
        assert (await _until(second, "waiting "))[-1]["status"].startswith("waiting for another change")
        copying = asyncio.ensure_future(call(product.address, "POST", "/api/copy", copy))
        registry.gate.set()
        assert _lines((await first.rest(head)).chunks)[-1] == {"status": "success"}
        assert _lines((await second.rest(second_head)).chunks)[-1] == {"status": "success"}
        assert (await copying).status == 200
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "copied-late"})).status == 200


async def test_a_registry_error_is_passed_through(product: Product, registry: Registry) -> None:
    unknown_model = {"model": registry.name("nothing"), "insecure": True}
    streamed = await call(product.address, "POST", "/api/pull", unknown_model)
    assert (streamed.status, streamed.lines()[-1]) == (200, {"error": "pull model manifest: file does not exist"})
    unstreamed = await call(product.address, "POST", "/api/pull", {**unknown_model, "stream": False})
    assert (unstreamed.status, unstreamed.json()) == (500, {"error": "pull model manifest: file does not exist"})
    plain = await call(product.address, "POST", "/api/pull", {"model": registry.name("pulled5")})
    assert "HTTP response to HTTPS client" in plain.lines()[-1]["error"]


async def test_weights_replaced_by_a_pull_are_unloaded_and_deleted(
    product: Product, registry: Registry, weights: Mapping[str, ModelFile], store: Path
) -> None:
    name = registry.name("pulled6")
    await call(product.address, "POST", "/api/pull", {"model": name, "insecure": True})
    body = {"model": name, "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert (await call(product.address, "POST", "/api/generate", body)).status == 200
    old_blob = store / "blobs" / weights["pulled6"].digest.replace(":", "-")
    assert old_blob.is_file()
    registry.put("pulled6", weights["pulled5"].path.read_bytes())
    assert (await call(product.address, "POST", "/api/pull", {"model": name, "insecure": True})).status == 200
    await eventually(lambda: not old_blob.exists(), what="the end of the old weights")
    await eventually(lambda: not any("pulled6" in n for names in product.resident().values() for n in names))
    assert not any("llamayard" in model["name"] for model in product.call("GET", "/api/tags")[1]["models"])
    assert (await call(product.address, "POST", "/api/generate", body)).status == 200
