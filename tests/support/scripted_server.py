"""A real HTTP server on loopback that answers as a test says, and remembers what it was asked."""

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
"""From the request's JSON body (None without one) to the answer."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    method: str
    path: str
    body: Any
    port: int
    """The client's: another one is another connection."""


@dataclass
class Scripted:
    """`answers`: by path; JSON data, or a function of the request's body. Other paths are 404, as Ollama's."""

    answers: dict[str, Any] = field(default_factory=dict[str, Any])
    asked: list[InferenceRequest] = field(default_factory=list[InferenceRequest])
    hung_up: list[str] = field(default_factory=list[str])
    """Paths whose client left before the answer."""
    url: str = ""

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        peer = request.transport.get_extra_info("peername") if request.transport is not None else ("", 0)
        self.asked.append(InferenceRequest(request.method, request.path, body, peer[1]))
        said = self.answers.get(request.path)
        if said is None:
            return web.Response(status=404, text="404 page not found")
        if not callable(said):
            return web.json_response(said)
        found: Any = said(body)
        try:
            return found if isinstance(found, web.Response) else await found
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
    """Always this status and these bytes."""
    return lambda _: web.Response(status=status, body=body)


async def hanging() -> web.Response:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")
