"""Killed servers, runners and routers: what clients see, what is restarted, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.real.conftest import MakeProduct
from tests.support.product import Product
from tests.support.rawhttp import Connection, call, connect, request_bytes
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.ollama

_LONG = {"model": "big", "prompt": "x", "options": {"num_predict": 3000, "seed": 1}}
_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


async def _begin(connection: Connection, body: object = _LONG) -> None:
    await connection.send(request_bytes("POST", "/api/generate", body))
    head = await connection.head()
    assert head.status == 200
    assert await connection.chunk()


def _server_of(product: Product, model: str) -> psutil.Process:
    (port,) = [port for port, names in product.resident().items() if model in names]
    return product.servers()[port]


async def _served(product: Product) -> bool:
    """Whether a request is served; one during the death of a server may get an error instead."""
    reply = await call(product.address, "POST", "/api/generate", _SHORT)
    return reply.status == 200 and reply.json().get("eval_count") == 2


async def test_a_killed_server_is_restarted_and_its_runner_removed(make_product: MakeProduct) -> None:
    product = make_product()
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection)
        server = _server_of(product, "big:latest")
        others = {process.pid for process in product.servers().values()} - {server.pid}
        orphans = server.children(recursive=True)
        assert orphans
        server.kill()
        reply = await connection.rest_after_head()
    assert b'"done":true' not in reply.body
    assert reply.end != "complete" or b"error" in reply.body
    await eventually(lambda: not any(orphan.is_running() for orphan in orphans), what="the end of its runner")
    await eventually(lambda: len(product.servers()) == 2, what="two servers")
    assert {process.pid for process in product.servers().values()} > others
    await eventually(lambda: _served(product), what="a served request")


async def test_the_model_of_a_killed_runner_is_reloaded(make_product: MakeProduct) -> None:
    product = make_product()
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection)
        (runner,) = product.runners()
        runner.kill()
        reply = await connection.rest_after_head()
    assert b"error" in reply.body
    await eventually(lambda: _served(product), what="a served request")
    assert len(product.servers()) == 2


async def test_a_restarted_router_removes_the_processes_of_a_killed_one(make_product: MakeProduct) -> None:
    product = make_product()
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection)
        old_processes = [*product.servers().values(), *product.runners()]
        assert len(old_processes) == 3
        product.signal(signal.SIGKILL)
        product.wait()
    product.start()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in old_processes)
    assert len(product.servers()) == 2
    assert await _served(product)
    product.signal(signal.SIGTERM)
    assert product.wait() == 0
    eventually_sync(lambda: not product.processes(), what="no process left")


@contextlib.contextmanager
def _leftover_tag(store: Path) -> Generator[Path]:
    """A temporary tag left by a router that was killed during an unload; its weights have other names too."""
    library = store / "manifests" / "registry.ollama.ai" / "library"
    manifest = library / "llamayard-unload" / "0123456789ab"
    manifest.parent.mkdir()
    shutil.copy(library / "tiny" / "latest", manifest)
    yield manifest
    shutil.rmtree(manifest.parent, ignore_errors=True)


async def test_a_leftover_temporary_tag_is_never_listed_and_soon_removed(
    make_product: MakeProduct, store: Path
) -> None:
    with _leftover_tag(store) as manifest:
        product = make_product(poll={"catalog_seconds": 3600.0})
        product.start()
        for path, rows, name in (("/api/tags", "models", "name"), ("/v1/models", "data", "id")):
            names = [row[name] for row in (await call(product.address, "GET", path)).json()[rows]]
            assert "tiny" in {listed.partition(":")[0] for listed in names}
            assert not [listed for listed in names if "llamayard" in listed]
        assert manifest.exists()
        product.signal(signal.SIGKILL)
        product.wait()
        product = make_product(poll={"catalog_seconds": 0.2})
        product.start()
        await eventually(lambda: not manifest.exists(), what="the removal of the temporary tag")
        reply = await call(product.address, "POST", "/api/generate", {**_SHORT, "model": "tiny"})
        assert (reply.status, reply.json()["eval_count"]) == (200, 2)


_REFUSED: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/generate", {"model": "tiny"}),
    ("POST", "/api/chat", {"model": "nobody", "messages": []}),
    ("POST", "/api/pull", {"model": "127.0.0.1:1/library/none", "insecure": True}),
    ("POST", "/api/copy", {"source": "tiny", "destination": "tiny2"}),
    ("DELETE", "/api/delete", {"model": "nobody"}),
    ("GET", "/api/tags", None),
    ("POST", "/api/show", {"model": "tiny"}),
)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_a_running_stream_finish(make_product: MakeProduct, signal_number: signal.Signals) -> None:
    product = make_product(server={"drain_timeout_seconds": 600.0})
    product.start()
    body = {**_LONG, "options": {"num_predict": 100, "seed": 1}}
    async with connect(product.address) as connection:
        await _begin(connection, body)
        product.signal(signal_number)
        await eventually(lambda: _refuses(product), what="a refusal of new requests")
        for method, path, body in _REFUSED:
            refused = await call(product.address, method, path, body)
            assert (refused.status, refused.header("Retry-After")) == (503, "5"), path
            assert refused.header("X-Llamayard-Error") == "shutting_down"
        assert (await call(product.address, "GET", "/ready")).status == 503
        assert (await call(product.address, "GET", "/health")).status == 200
        assert product.process is not None
        assert product.process.poll() is None
        reply = await connection.rest_after_head()
    assert reply.end == "complete"
    assert reply.lines()[-1]["done_reason"] == "length"
    assert product.wait() == 0
    assert not product.processes()


async def _refuses(product: Product) -> bool:
    return (await call(product.address, "POST", "/api/generate", _SHORT)).status == 503


async def test_under_nohup_sighup_is_ignored(make_product: MakeProduct) -> None:
    product = make_product(server={"drain_timeout_seconds": 600.0})
    product.program = ("sh", "-c", """trap "" HUP; exec "$0" "$@" """, *product.program)
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection, {**_LONG, "options": {"num_predict": 100, "seed": 1}})
        product.signal(signal.SIGHUP)
        assert (await call(product.address, "GET", "/ready")).status == 200
        product.signal(signal.SIGTERM)  # counts as the first signal: a second one would cut the stream
        reply = await connection.rest_after_head()
    assert reply.lines()[-1]["done_reason"] == "length"
    assert product.wait() == 0


@pytest.mark.parametrize("second_signal", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_stops_immediately(make_product: MakeProduct, second_signal: signal.Signals) -> None:
    product = make_product(server={"drain_timeout_seconds": 600.0})
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection)
        product.signal(signal.SIGINT)
        await eventually(lambda: _refuses(product), what="a refusal of new requests")
        product.signal(second_signal)
        reply = await connection.rest_after_head()
    assert b'"done":true' not in reply.body
    assert reply.end == "complete"
    assert "a second signal stopped it at once" in reply.lines()[-1]["error"], "not: that the instance died"
    product.wait()
    eventually_sync(lambda: not product.processes(), what="no process left")


async def test_the_drain_has_a_deadline(make_product: MakeProduct) -> None:
    product = make_product(server={"drain_timeout_seconds": 0.5})
    product.start()
    async with connect(product.address) as connection:
        await _begin(connection)
        product.signal(signal.SIGTERM)
        reply = await connection.rest_after_head()
    assert reply.end == "complete"
    assert "server.drain_timeout_seconds (0.5 s)" in reply.lines()[-1]["error"]
    product.wait()
    assert not product.processes()


@contextlib.contextmanager
def _occupied(port: int) -> Generator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


def test_an_occupied_port_is_reported(make_product: MakeProduct) -> None:
    product = make_product()
    with _occupied(product.address.port):
        product.start(ready=False)
        code = product.wait()
    assert code not in (0, None)
    log_text = product.log_text()
    assert str(product.address.port) in log_text
    assert "Traceback" not in log_text
    assert "port" in log_text
    assert not product.processes()


def test_a_missing_binary_is_reported(make_product: MakeProduct) -> None:
    product = make_product(ollama={"binary": "/nonexistent/ollama"})
    product.start(ready=False)
    code = product.wait()
    assert code not in (0, None)
    assert "/nonexistent/ollama" in product.log_text()
    assert "Traceback" not in product.log_text()


def test_an_unknown_key_is_refused_with_the_nearest_valid_one(make_product: MakeProduct) -> None:
    product = make_product(olama={"binary": "x"})
    product.start(ready=False)
    assert product.wait() not in (0, None)
    assert "ollama" in product.log_text()
    assert "olama" in product.log_text()
