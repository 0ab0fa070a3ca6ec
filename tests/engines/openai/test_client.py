"""What a server with OpenAI's API may answer to a check: all that is no list of models is one failure of the check."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from router.engines.base import ProbeFailed
from router.engines.ollama.health_probe import probe_version
from router.engines.openai.client import listed_models

NONSENSE = {
    "not JSON": b"<html>",
    "another type": b'{"data": 1}',
    "not UTF-8": b'{"data": [{"id": "\xff"}], "version": "\xff"}',
    "nested too deeply": b'{"x": ' + b"[" * 100_000,
}


@pytest.fixture
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=request.param, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


@pytest.mark.parametrize("url", NONSENSE.values(), ids=NONSENSE, indirect=True)
async def test_nonsense_fails_the_check(url: str) -> None:
    with pytest.raises(ProbeFailed):
        await listed_models(url, {}, 10.0)
    with pytest.raises(ProbeFailed):
        await probe_version(url, 10.0, {})
