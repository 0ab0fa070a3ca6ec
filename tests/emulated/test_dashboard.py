"""The dashboard's routes over the whole program: its events, its commands, and who may see it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.dashboard.test_merge_patch import applied
from tests.support.ollama_server import free_port
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address, Connection, call, connect, request_bytes
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_POLLS = {"poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2, "catalog_seconds": 0.2}}
_MODEL = "llama3.1:8b"


def _product(folder: Path, rig: str = "3090", **config: Any) -> Product:
    return prepare(folder, {**_POLLS, **config}, _FAST, ("--rig", rig))


class _Events:
    """The stream of events of one page."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rest = ""
        self.document: dict[str, Any] = {}

    async def next(self) -> dict[str, Any]:
        """The document after the next event."""
        while "\n\n" not in self._rest:
            chunk = await self._connection.chunk()
            assert chunk, "the stream has ended"
            self._rest += chunk.decode()
        event, _, self._rest = self._rest.partition("\n\n")
        name, data = (line.partition(": ")[2] for line in event.split("\n"))
        content = json.loads(data)
        self.document = content if name == "document" else applied(self.document, content)
        return self.document


@asynccontextmanager
async def _events(address: Address, headers: tuple[tuple[str, str], ...] = ()) -> AsyncGenerator[_Events]:
    async with connect(address) as connection:
        await connection.send(request_bytes("GET", "/llamayard/events", headers=headers))
        head = await connection.head()
        assert head.status == 200
        assert head.header("content-type") == "text/event-stream"
        yield _Events(connection)


async def test_events_follow_a_request_from_the_queue_to_its_end(tmp_path: Path) -> None:
    config = {**_POLLS, "ollama": {"num_parallel": 1}, "models": {_MODEL: {"replicas_max": 1}}}
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "4"}, ("--rig", "3090"))) as product:
        async with _events(product.address) as events, asyncio.TaskGroup() as group:
            document = await events.next()
            assert document["emulated"] == "EMULATED rig 3090"
            assert (document["running"], document["waiting"], document["models"]) == ({}, {}, {})
            body = {"model": _MODEL, "prompt": "hello", "options": {"num_predict": 2000}}
            for user in ("anna", "ben"):
                headers = (("X-OpenWebUI-User-Id", user),)
                group.create_task(call(product.address, "POST", "/api/generate", body, headers))
            while not (document["running"] and document["waiting"]):
                document = await events.next()
            (request,), (ticket,) = document["running"].values(), document["waiting"].values()
            assert {request["client"], ticket["client"]} == {"user:anna", "user:ben"}
            assert (request["model"], request["instance"], ticket["model"]) == (_MODEL, "gpu0", _MODEL)
            while not (tokens := next(iter(document["running"].values()), {}).get("tokens", 0)):
                document = await events.next()
            assert tokens > 0
            (model,) = document["models"].values()
            assert (model["name"], model["in_flight"], model["slots"]) == (_MODEL, 1, 1)
            while document["running"] or document["waiting"]:
                document = await events.next()
            assert {row["event"] for row in document["decisions"].values()} >= {"load", "loaded"}
            assert max(point["tokens_per_second"] for point in document["points"].values()) > 0
            assert _MODEL in {span["model"] for span in document["spans"].values()}


async def test_a_model_is_loaded_and_unloaded(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        status, answer = product.call("POST", "/llamayard/load", {"model": _MODEL, "context": 4096})
        assert (status, answer["model"], answer["instance"]) == (200, _MODEL, "gpu0")
        (model,) = product.call("GET", "/llamayard/status")[1]["models"]
        assert (model["state"], model["in_flight"]) == ("ready", 0)
        status, answer = product.call("POST", "/llamayard/unload", {"model": _MODEL})
        assert (status, [row["instance"] for row in answer["replicas"]]) == (200, ["gpu0"])
        await eventually(lambda: not product.call("GET", "/llamayard/status")[1]["models"], what="unloaded")
        assert product.call("POST", "/llamayard/unload", {"model": _MODEL})[1]["replicas"] == []


@pytest.mark.parametrize("command", ["load", "unload"])
async def test_commands_for_models_say_what_is_wrong_with_them(tmp_path: Path, command: str) -> None:
    with running(_product(tmp_path)) as product:
        bodies: tuple[tuple[Any, int, str], ...] = (
            ({}, 400, 'model: missing; send {"model": "NAME"}'),
            ({"model": "nope"}, 404, "model 'nope' not found"),
            ({"name": "x"}, 400, "unknown field `name`"),
            ({"model": _MODEL, "context": "many"}, 400, "context: 'many'"),
            ([], 400, "the body is no command"),
        )
        for body, status, words in bodies:
            found, answer = product.call("POST", f"/llamayard/{command}", body)
            assert (found, words in answer["error"]) == (status, True), answer


async def test_a_load_that_its_client_gives_up_leaves_nothing_behind(tmp_path: Path) -> None:
    slow = prepare(tmp_path, _POLLS, {"LLAMAYARD_RIG_SPEED": "1"}, ("--rig", "3090"))
    with running(slow) as product:
        async with connect(product.address) as connection:
            await connection.send(request_bytes("POST", "/llamayard/load", {"model": "qwen3:32b"}))
            await eventually(lambda: product.call("GET", "/llamayard/status")[1]["queue"]["waiting"] == 1)
        await eventually(lambda: product.call("GET", "/llamayard/status")[1]["queue"]["waiting"] == 0)


async def test_an_open_page_does_not_hold_up_the_end_of_the_router(tmp_path: Path) -> None:
    with running(_product(tmp_path, server={"drain_timeout_seconds": 600})) as product:
        async with _events(product.address) as events:
            await events.next()
            product.signal(signal.SIGTERM)
            assert await asyncio.to_thread(product.wait) == 0
    assert "requests_cut" not in product.log_text()


async def test_the_page_is_served_with_a_policy_and_is_not_sent_twice(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        page = await call(product.address, "GET", "/ui")
        assert (page.status, page.header("content-type")) == (200, "text/html; charset=utf-8")
        policy = page.header("content-security-policy") or ""
        assert "default-src 'none'" in policy and "unsafe" not in policy
        script = await call(product.address, "GET", "/ui/app.js")
        assert (script.status, script.header("content-type")) == (200, "text/javascript; charset=utf-8")
        tag = script.header("etag") or ""
        again = await call(product.address, "GET", "/ui/app.js", headers=(("If-None-Match", tag),))
        assert (again.status, again.body) == (304, b"")
        assert (await call(product.address, "HEAD", "/ui")).status == 200
        for path in ("/ui/nope.js", "/ui/..%2fhandler.py", "/ui/vendored.json"):
            assert (await call(product.address, "GET", path)).status in (307, 404), path
        assert (await call(product.address, "GET", "/ui/")).header("location") == "/ui"
        assert (await call(product.address, "POST", "/ui")).status == 405


async def test_the_dashboard_can_be_off(tmp_path: Path) -> None:
    with running(_product(tmp_path, dashboard={"enabled": False})) as product:
        for path in ("/ui", "/ui/app.js", "/llamayard/events"):
            status, answer = product.call("GET", path)
            assert (status, answer["error"]) == (403, "the dashboard is off (dashboard.enabled)")


async def test_on_an_open_listener_without_keys_it_is_off_and_says_why(tmp_path: Path) -> None:
    with running(_product(tmp_path, server={"host": "0.0.0.0", "allow_anonymous": True})) as product:
        for path in ("/ui", "/llamayard/events"):
            status, answer = product.call("GET", path)
            assert (status, "there are no access keys" in answer["error"]) == (403, True)


async def test_it_is_where_metrics_and_status_are(tmp_path: Path) -> None:
    port = free_port()
    with running(_product(tmp_path, admin={"listen": f"127.0.0.1:{port}"})) as product:
        for path in ("/ui", "/ui/app.css", "/llamayard/events", "/llamayard/load"):
            assert (await call(product.address, "GET", path)).status == 404
        admin = Address("127.0.0.1", port)
        assert (await call(admin, "GET", "/ui")).status == 200
        assert (await call(admin, "POST", "/llamayard/load", {"model": _MODEL})).json()["instance"] == "gpu0"
        async with _events(admin) as events:
            assert len((await events.next())["models"]) == 1


def _key(product: Product, *flags: str) -> Mapping[str, str]:
    command = [sys.executable, "-m", "router", "keys", "create", *flags, "--config", str(product.config)]
    made = subprocess.run(command, env=dict(product.environment), capture_output=True, text=True, check=True)
    return {"Authorization": f"Bearer {made.stdout.strip()}"}


async def test_with_keys_what_it_shows_needs_an_admins(tmp_path: Path) -> None:
    product = _product(tmp_path)
    admin, user = _key(product, "ops", "--class", "admin"), _key(product, "anna")
    with running(product):
        assert (await call(product.address, "GET", "/ui")).status == 200
        assert (await call(product.address, "GET", "/llamayard/events")).status == 401
        refused = await call(product.address, "GET", "/llamayard/events", headers=tuple(user.items()))
        assert refused.status == 403
        headers = tuple(admin.items())
        assert (await call(product.address, "POST", "/llamayard/load", {"model": _MODEL}, headers)).status == 200
        assert (await call(product.address, "POST", "/llamayard/unload", {"model": _MODEL}, headers)).status == 200
        async with _events(product.address, headers) as events:
            assert (await events.next())["gpus"]
