"""Pull, create, copy and delete through the router, as both its servers see them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pytest

from tests.support.ollama_server import ModelFile, blocking_call
from tests.support.product import Product
from tests.support.rawhttp import Address, call, connect, request_bytes
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama


async def _on_each_server(product: Product, name: str) -> list[bool]:
    """Whether each of the two servers lists the model; waits for a restarting server."""
    urls = {view["url"] for view in product.call("GET", "/llamayard/status")[1]["instances"]}
    addresses = [Address("127.0.0.1", int(url.rpartition(":")[2])) for url in sorted(urls)]
    await eventually(lambda: all(_is_up(address) for address in addresses), what="an answer of each server")
    lists = [blocking_call(address, "GET", "/api/tags")[1] for address in addresses]
    return [any(model["name"] == name for model in listed["models"]) for listed in lists]


def _is_up(address: Address) -> bool:
    try:
        return blocking_call(address, "GET", "/api/version")[0] == 200
    except OSError:
        return False


async def test_a_created_model_is_listed_by_both_servers_and_runs(product: Product) -> None:
    body = {"model": "derived", "from": "tiny", "system": "be brief", "parameters": {"num_predict": 3}}
    reply = await call(product.address, "POST", "/api/create", body)
    assert (reply.status, reply.lines()[-1]) == (200, {"status": "success"})
    assert await _on_each_server(product, "derived:latest") == [True, True]
    answer = await call(product.address, "POST", "/api/generate", {"model": "derived", "prompt": "x", "stream": False})
    assert answer.json()["eval_count"] == 3
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "derived"})).status == 200
    assert await _on_each_server(product, "derived:latest") == [False, False]
    answer = await call(product.address, "POST", "/api/generate", {"model": "derived", "prompt": "x"})
    assert answer.status == 404


async def test_a_copy_is_listed_by_both_servers_until_it_is_deleted(product: Product) -> None:
    reply = await call(product.address, "POST", "/api/copy", {"source": "tiny", "destination": "twin"})
    assert (reply.status, reply.body) == (200, b"")
    assert await _on_each_server(product, "twin:latest") == [True, True]
    reply = await call(product.address, "DELETE", "/api/delete", {"model": "twin"})
    assert (reply.status, reply.body) == (200, b"")
    assert await _on_each_server(product, "twin:latest") == [False, False]
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "twin"})).status == 404


async def test_a_failed_pull_passes_the_servers_message_on(product: Product) -> None:
    reply = await call(product.address, "POST", "/api/pull", {"model": "127.0.0.1:1/library/none", "insecure": True})
    assert reply.status == 200
    assert reply.lines()[0] == {"status": "pulling manifest"}
    assert "connection refused" in reply.lines()[-1]["error"]
    unstreamed = {"model": "127.0.0.1:1/library/none", "insecure": True, "stream": False}
    reply = await call(product.address, "POST", "/api/pull", unstreamed)
    assert reply.status == 500
    assert "connection refused" in reply.json()["error"]


async def test_a_blob_can_be_uploaded_in_chunks(product: Product) -> None:
    data = b"a blob of a test" * 100_000
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    async with connect(product.address) as connection:
        head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await connection.send(head.encode())
        for start in range(0, len(data), 65536):
            part = data[start : start + 65536]
            await connection.write(b"%x\r\n%s\r\n" % (len(part), part))
        await connection.write(b"0\r\n\r\n")
        assert (await connection.reply()).status == 201
    assert (await call(product.address, "HEAD", f"/api/blobs/{digest}")).status == 200
    assert (await call(product.address, "POST", f"/api/blobs/{digest}", data)).status == 200


async def test_an_upload_of_existing_weights_is_answered_without_breaking_the_connection(
    product: Product, files: Mapping[str, ModelFile]
) -> None:
    big = files["big"]
    raw = request_bytes("POST", f"/api/blobs/{big.digest}", big.path.read_bytes())
    async with connect(product.address) as connection:
        await connection.send(raw[:200])
        assert (await connection.head()).status == 200
