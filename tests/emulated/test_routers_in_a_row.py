"""Routers behind each other, and addresses that lead back to the router itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import free_port
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address, call
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_QUICK_POLLS = {"poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}
_ASKED = {"model": "llama3.1:8b", "prompt": "hello", "stream": False, "options": {"num_predict": 4}}


def _router(folder: Path, port: int, attached: str, address: Address) -> Product:
    """A router with one emulated GPU, and a server at `address` attached."""
    folder.mkdir()
    instances = [{"name": "own", "gpus": [0]}, {"name": attached, "url": address.url}]
    return prepare(folder, {**_QUICK_POLLS, "instances": instances}, _FAST, ("--rig", "3090"), port)


@contextlib.asynccontextmanager
async def _forwarder(target: Address) -> AsyncGenerator[Address]:
    """A proxy on another port, such as nginx or a tunnel."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward_reader, onward_writer = await asyncio.open_connection(target.host, target.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, onward_writer), pump(onward_reader, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    async with server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])


def _instances(product: Product) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in product.call("GET", "/llamayard/status")[1]["instances"]}


def _names(product: Product) -> list[str]:
    return [row["name"] for row in product.call("GET", "/api/tags")[1]["models"]]


async def test_an_attached_address_that_leads_back_is_told_and_not_used(tmp_path: Path) -> None:
    port = free_port()
    async with _forwarder(Address("127.0.0.1", port)) as forwarder:
        with running(_router(tmp_path / "a", port, "back", forwarder)) as product:
            await eventually(
                lambda: "already passed" in (_instances(product)["back"]["reason"] or ""), what="the reason"
            )
            assert _instances(product)["back"]["state"] != "ready"
            reply = await call(product.address, "POST", "/api/generate", _ASKED)
            assert (reply.status, reply.header("X-Llamayard-Instance")) == (200, "own")


@pytest.mark.parametrize("count", [2, 3])
async def test_routers_in_a_circle_that_have_only_each_other_name_the_loop(tmp_path: Path, count: int) -> None:
    ports = [free_port() for _ in range(count)]
    products = list[Product]()
    for at, port in enumerate(ports):
        (tmp_path / str(at)).mkdir()
        further = {"name": "next", "url": f"http://127.0.0.1:{ports[(at + 1) % count]}"}
        products.append(prepare(tmp_path / str(at), {"instances": [further]}, port=port))
    with contextlib.ExitStack() as stack:
        for product in products:
            stack.callback(product.destroy)
            product.start(ready=False)

        def is_named() -> bool:
            reasons = [_instances(product)["next"]["reason"] or "" for product in products]
            return all("leads back to the router; correct its address" in reason for reason in reasons)

        await eventually(lambda: all(map(_answers, products)), what="the routers")
        await eventually(is_named, what="the reason")


def _answers(product: Product) -> bool:
    with contextlib.suppress(OSError):
        return product.call("GET", "/health")[0] == 200
    return False


async def test_routers_that_are_attached_to_each_other_list_and_serve_each_model_once(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    far, near = (Address("127.0.0.1", port) for port in ports)
    with (
        running(_router(tmp_path / "far", far.port, "near", near)) as behind,
        running(_router(tmp_path / "near", near.port, "far", far)) as product,
    ):
        put_into_store(_store(behind), "faraway", LLAMA_8B)
        await eventually(lambda: "faraway:latest" in _names(product), what="the other's model")
        assert (await call(behind.address, "POST", "/api/generate", {**_ASKED, "model": "faraway"})).status == 200
        await eventually(lambda: _serves(product, "far", "faraway:latest"), what="the other's replica")
        reply = await call(product.address, "POST", "/api/generate", {**_ASKED, "model": "faraway"})
        assert (reply.status, reply.header("X-Llamayard-Instance")) == (200, "far"), reply.body
        await eventually(
            lambda: _instances(behind)["near"]["state"] == "ready", what="each is an instance of the other"
        )
        assert _names(behind).count("faraway:latest") == 1


async def test_a_router_with_nothing_of_its_own_serves_through_another(tmp_path: Path) -> None:
    behind = prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "3090"))
    front = tmp_path / "front"
    front.mkdir()
    with running(behind), running(_front(front, behind.address)) as product:
        reply = await call(product.address, "POST", "/api/generate", _ASKED)
        assert (reply.status, reply.header("X-Llamayard-Instance")) == (200, "far"), reply.body


def _front(folder: Path, address: Address) -> Product:
    return prepare(folder, {**_QUICK_POLLS, "instances": [{"name": "far", "url": address.url}]})


def _serves(product: Product, instance: str, model: str) -> bool:
    rows = product.call("GET", "/llamayard/status")[1]["models"]
    return any((row["instance"], row["name"], row["state"]) == (instance, model, "ready") for row in rows)


def _store(product: Product) -> Path:
    (server,) = product.servers().values()
    return Path(server.environ()["OLLAMA_MODELS"])
