"""The whole program: what a client may do to the model store, and what it may make a server connect to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    config = {"management": {"disk_free_min_bytes": 0, "pull_max_bytes": "1GiB"}, "log": {"format": "json"}}
    with running(prepare(tmp_path_factory.mktemp("rules"), config, _FAST, ("--rig", "h100"))) as product:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in product.servers().values()}
        put_into_store(Path(store), "small", LLAMA_8B)
        yield product


@contextlib.asynccontextmanager
async def _elsewhere(asked: list[str], redirect: str = "") -> AsyncGenerator[str]:
    """A server that is not the router's; with `redirect` it sends everybody there, except for its version."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        if redirect and request.path != "/api/version":
            return web.Response(status=307, headers={"Location": redirect + request.path})
        return web.json_response({"version": "0.34.0", "models": []})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/api/pull", {"model": "{host}/x/y", "insecure": True}),
        ("/api/pull", {"name": "http://{host}/x/y", "insecure": True}),
        ("/api/create", {"model": "new", "from": "{host}/x/y"}),
        ("/api/create", {"model": "new", "From": "{host}/x/y"}),
        ("/api/create", {"model": "new", "from": "small", "remote_host": "http://{host}"}),
        ("/api/push", {"model": "{host}/x/y", "insecure": True}),
        ("/api/push", {"model": "small"}),
    ],
)
async def test_no_client_makes_a_server_connect_to_an_address_of_its_choice(
    product: Product, path: str, members: dict[str, Any]
) -> None:
    asked: list[str] = []
    async with _elsewhere(asked) as url:
        host = url.removeprefix("http://")
        body = {key: value.format(host=host) if isinstance(value, str) else value for key, value in members.items()}
        reply = await call(product.address, "POST", path, body)
    assert (reply.status, reply.header("X-Llamayard-Error")) == (403, "forbidden")
    assert asked == []


@pytest.mark.parametrize("path", ["/api/me", "/api/signout"])
async def test_routes_of_the_servers_account_are_off(product: Product, path: str) -> None:
    assert (await call(product.address, "POST", path, {})).status == 403


async def test_what_is_allowed_still_works(product: Product) -> None:
    copy = {"source": "small", "destination": "copied"}
    assert (await call(product.address, "POST", "/api/copy", copy)).status == 200
    made = await call(product.address, "POST", "/api/create", {"model": "made", "from": "small", "stream": False})
    assert made.status == 200, made.body
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "made"})).status == 200


async def test_a_full_disk_refuses_what_would_fill_it(tmp_path: Path) -> None:
    config = {"management": {"pull": ["*"], "disk_free_min_bytes": 1 << 60}}
    with running(prepare(tmp_path, config, _FAST, ("--rig", "h100"))) as product:
        digest = f"/api/blobs/sha256:{'0' * 64}"
        for path, body in (("/api/pull", {"model": "x"}), ("/api/create", {"model": "x"}), (digest, b"weights")):
            reply = await call(product.address, "POST", path, body)
            assert (reply.status, reply.header("X-Llamayard-Error")) == (507, "disk_full"), reply.body


async def test_an_attached_server_that_redirects_is_not_followed(tmp_path: Path) -> None:
    asked, followed = list[str](), list[str]()
    async with _elsewhere(followed) as other, _elsewhere(asked, other) as attached:
        config = {"instances": [{"url": attached}], "poll": {"residency_seconds": 0.1, "catalog_seconds": 0.1}}
        product = prepare(tmp_path, config, _FAST)
        product.start(ready=False)
        try:
            await eventually(lambda: is_ready(product), what="a ready instance")
            for path in ("/api/tags", "/api/ps", "/v1/models"):
                await call(product.address, "GET", path)
            for path in ("/api/chat", "/api/show", "/v1/responses"):
                await call(product.address, "POST", path, {"model": "x", "messages": []})
        finally:
            product.destroy()
    assert {"GET /api/tags", "GET /api/ps", "GET /v1/models", "POST /v1/responses"} <= set(asked)
    assert followed == []


async def is_ready(product: Product) -> bool:
    with contextlib.suppress(OSError):
        return (await call(product.address, "GET", "/ready")).status == 200
    return False
