"""A pull whose answer goes wrong ends visibly for all who follow it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from router.errors import RouterError
from router.gateway.context import GatewayContext
from router.gateway.peek import peek
from router.gateway.pulls import Pulls
from router.gateway.requests import RequestInfo

_PATH = "/api/pull"
_STATUS = b'{"status":"pulling manifest"}\n'


def _server(handler: Any) -> TestServer:
    app = web.Application()
    app.router.add_post(_PATH, handler)
    return TestServer(app)


async def _overlong(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(_STATUS)
    await response.write(b"x" * (8 << 20) + b"\n")
    return response


@pytest.mark.parametrize("stream", [True, False])
async def test_a_line_that_nobody_can_read_is_an_error_and_no_success(stream: bool) -> None:
    body = b'{"model":"m","stream":%s}' % (b"true" if stream else b"false")
    async with _server(_overlong) as behind, aiohttp.ClientSession() as session:
        url = str(behind.make_url("")).rstrip("/")
        context = SimpleNamespace(
            writing=asyncio.Lock(), catalog=SimpleNamespace(forget_all=lambda: None), session=session,
            primary=lambda: SimpleNamespace(spec=SimpleNamespace(url=url)),
            limits=SimpleNamespace(idle_timeout_seconds=60.0),
        )  # fmt: skip
        pulls = Pulls(cast("GatewayContext", context))

        async def pull(request: web.Request) -> web.StreamResponse:
            told = await request.read()
            try:
                return await pulls.serve(request, told, peek(told, _PATH), RequestInfo("id", "someone", _PATH, 0.0))
            except RouterError as error:  # which the gateway answers in the form of the API
                return web.Response(status=500, body=msgspec.json.encode({"error": error.message}))

        async with _server(pull) as front, session.post(front.make_url(_PATH), data=body) as reply:
            text = await reply.read()
    assert reply.status == (200 if stream else 500)
    last = text.splitlines()[-1]
    assert last.startswith(b'{"error":"the instance\'s answer cannot be read: ')
    assert text.startswith(_STATUS) == stream
