"""A pull whose answer goes wrong ends visibly for all who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestServer

from router.api.context import ApiContext
from router.api.management_rules import ManagementRules
from router.api.shared_pulls import Pulls
from router.errors import RouterError
from router.llm_api.body_reader import parse_body
from router.observability.request_record import RequestRecord

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


@asynccontextmanager
async def _front(
    handler: Any,
    rules: ManagementRules = ManagementRules(),  # noqa: B008
) -> AsyncGenerator[Callable[[bytes], AbstractAsyncContextManager[ClientResponse]]]:
    """What asks for a pull of a server that is `handler`."""
    async with _server(handler) as behind, aiohttp.ClientSession() as session:
        url = str(behind.make_url("")).rstrip("/")

        async def ready_primary() -> Any:
            return SimpleNamespace(spec=SimpleNamespace(url=url))

        context = SimpleNamespace(
            writing=asyncio.Lock(), catalog=SimpleNamespace(forget_all=lambda: None), session=session,
            ready_primary=ready_primary,
            limits=SimpleNamespace(idle_timeout_seconds=60.0, first_byte_timeout_seconds=60.0), management=rules,
        )  # fmt: skip
        pulls = Pulls(cast("ApiContext", context))

        async def pull(request: web.Request) -> web.StreamResponse:
            told = await request.read()
            try:
                return await pulls.serve(
                    request, told, parse_body(told, _PATH), RequestRecord("id", "someone", _PATH, 0.0)
                )
            except RouterError as error:  # which the gateway answers in the form of the API
                return web.Response(status=500, body=msgspec.json.encode({"error": error.message}))

        async with _server(pull) as front:
            yield lambda body: session.post(front.make_url(_PATH), data=body)


async def _large(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for line in (
        _STATUS, b'{"status":"pulling a","digest":"a","total":600}\n',
        b'{"status":"pulling b","digest":"b","total":500}\n', b'{"status":"success"}\n',
    ):  # fmt: skip
        await response.write(line)
    return response


@pytest.mark.parametrize(
    ("rules", "end"),
    [
        (ManagementRules(pull_max_bytes=1100), b'{"status":"success"}'),
        (ManagementRules(pull_max_bytes=1099), b"1100 bytes or more, and at most 1099 may be pulled"),
        (ManagementRules(disk_free_min_bytes=100, free_bytes=lambda: 1200), b'{"status":"success"}'),
        (ManagementRules(disk_free_min_bytes=101, free_bytes=lambda: 1200), b"would leave less than 101"),
    ],
)
async def test_a_pull_that_turns_out_too_large_is_broken_off(rules: ManagementRules, end: bytes) -> None:
    async with _front(_large, rules) as ask, ask(b'{"model":"m"}') as reply:
        assert end in (await reply.read()).splitlines()[-1]


async def test_a_server_that_redirects_a_pull_is_not_followed() -> None:
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    async with _server(elsewhere) as other:
        target = str(other.make_url(_PATH))

        async def redirecting(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": target})

        async with _front(redirecting) as ask, ask(b'{"model":"m"}') as reply:
            assert reply.status == 307 or await reply.read()
    assert asked == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_line_that_nobody_can_read_is_an_error_and_no_success(stream: bool) -> None:
    body = b'{"model":"m","stream":%s}' % (b"true" if stream else b"false")
    async with _front(_overlong) as ask, ask(body) as reply:
        text = await reply.read()
    assert reply.status == (200 if stream else 500)
    last = text.splitlines()[-1]
    assert last.startswith(b'{"error":"invalid reply from the instance: ')
    assert text.startswith(_STATUS) == stream


async def test_a_body_that_is_nested_as_deeply_as_go_reads_is_a_pull_like_any_other() -> None:
    async def pulled(request: web.Request) -> web.Response:
        return web.Response(body=_STATUS, content_type="application/x-ndjson")

    async with _front(pulled) as ask, ask(b'{"x":%s%s,"model":"m"}' % (b"[" * 9000, b"]" * 9000)) as reply:
        assert (reply.status, await reply.read()) == (200, _STATUS)


@pytest.mark.parametrize(
    "other",
    [
        b'{"model":"m","insecure":true}',
        b'{"model":"m","INSECURE":true} and more',
        b'{"model":"m","insecure":true,"insecure":null}',
        b'{"model":"m","insecure":true,"x":"\\ud83d"}',
    ],
)
async def test_a_pull_that_does_without_tls_is_not_shared_with_one_that_insists_however_it_is_written(
    other: bytes,
) -> None:
    gate = asyncio.Event()

    async def pulled(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(_STATUS)
        await gate.wait()
        return response

    async with _front(pulled) as ask, ask(b'{"model":"m"}') as first:
        assert await first.content.readline() == _STATUS
        async with ask(other) as second:
            assert b"waiting for another change" in await second.content.readline()
            gate.set()
            assert _STATUS in await second.read()
