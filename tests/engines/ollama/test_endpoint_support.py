"""New endpoints are checked once per server version, and a missing API is refused clearly."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.engines.ollama.endpoint_support import EndpointSupport, refuse_missing
from router.errors import InstanceLost, NotSupported


@asynccontextmanager
async def _server(asked: list[str]) -> AsyncGenerator[str]:
    """A server with `/v1/messages`, which refuses an empty request, and no other path."""

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        if request.path == "/v1/messages":
            return web.json_response({"error": "EOF"}, status=400)
        return web.Response(status=404, text="404 page not found")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _view(url: str, version: str = "0.24.0") -> InstanceView:
    return InstanceView(InstanceSpec(InstanceName("a"), (), url), InstanceState.READY, version)


async def test_a_server_is_checked_once_for_each_version_and_path() -> None:
    asked: list[str] = []
    async with _server(asked) as url, aiohttp.ClientSession() as session:
        endpoint_support = EndpointSupport(session)
        assert endpoint_support.known(_view(url), "/v1/messages") is None
        for _ in range(2):
            assert await endpoint_support.has(_view(url), "/v1/messages")
            assert not await endpoint_support.has(_view(url), "/v1/audio/transcriptions")
        assert endpoint_support.known(_view(url), "/v1/messages") is True
        assert asked == ["/v1/messages", "/v1/audio/transcriptions"]
        assert await endpoint_support.has(_view(url, "0.25.0"), "/v1/messages")
        assert len(asked) == 3


async def test_old_endpoints_are_never_checked() -> None:
    async with aiohttp.ClientSession() as session:
        assert await EndpointSupport(session).has(_view("http://127.0.0.1:1"), "/api/chat")


async def test_an_unreachable_server_is_lost_and_not_cached() -> None:
    async with aiohttp.ClientSession() as session:
        endpoint_support, view = EndpointSupport(session), _view("http://127.0.0.1:1")
        with pytest.raises(InstanceLost, match="/v1/messages"):
            await endpoint_support.has(view, "/v1/messages")
        assert endpoint_support.known(view, "/v1/messages") is None


def test_a_missing_api_is_refused_with_the_version_and_other_paths_are_not() -> None:
    with pytest.raises(NotSupported, match=r"Ollama 0\.11\.4, which does not have /v1/responses"):
        refuse_missing(_view("http://a", "0.11.4"), "/v1/responses")
    refuse_missing(_view("http://a", "0.11.4"), "/v1/images/generations")
