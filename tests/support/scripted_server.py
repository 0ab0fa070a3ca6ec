"""A real HTTP server on loopback with scripted responses, which records the requests it receives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Answer = Callable[[Any], "web.Response | Awaitable[web.Response]"]
"""Maps the request's JSON body (None without one) to a response."""


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    method: str
    path: str
    body: Any
    port: int
    """The client's port; identifies the connection."""


@dataclass
class Scripted:
    """`answers` by path: JSON data, or a function of the request's body. Other paths are 404, as in Ollama."""

    answers: dict[str, Any] = field(default_factory=dict[str, Any])
    requests: list[ReceivedRequest] = field(default_factory=list[ReceivedRequest])
    hung_up: list[str] = field(default_factory=list[str])
    """Paths of requests whose client disconnected before the response."""
    url: str = ""

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        peer = request.transport.get_extra_info("peername") if request.transport is not None else ("", 0)
        self.requests.append(ReceivedRequest(request.method, request.path, body, peer[1]))
        answer = self.answers.get(request.path)
        if answer is None:
            return web.Response(status=404, text="404 page not found")
        if not callable(answer):
            return web.json_response(answer)
        response: Any = answer(body)
        try:
            return response if isinstance(response, web.Response) else await response
        except asyncio.CancelledError:
            self.hung_up.append(request.path)
            raise


@asynccontextmanager
async def scripted(answers: dict[str, Any]) -> AsyncGenerator[Scripted]:
    script = Scripted(answers)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", script.answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    try:
        script.url = str(server.make_url("")).rstrip("/")
        yield script
    finally:
        await server.close()


def failing(status: int, body: bytes = b"") -> Answer:
    """Always responds with this status and body."""
    return lambda _: web.Response(status=status, body=body)


async def hanging() -> web.Response:
    """Never responds."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
