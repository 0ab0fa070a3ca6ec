"""A real HTTP server on loopback that has OpenAI's API as vLLM and llama-server have it, with scripted answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

OWN_NAME = "Org/Big-Model-AWQ"

Answer = Callable[["Asked", web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the server got it."""

    path: str
    raw: bytes
    headers: Mapping[str, str]

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


def delta(**content: Any) -> dict[str, Any]:
    return {"id": "c1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": content}]}


def finish(reason: str) -> dict[str, Any]:
    return {"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"id": "c1", "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


HELLO = (delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo"), finish("stop"), usage(7, 2))


def streaming(*events: Any, done: bool = True) -> Answer:
    """These events, and the end mark."""

    async def answer(asked: Asked, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for each in events:
            await response.write(event(each))
        if done:
            await response.write(event(b"[DONE]"))
        return response

    return answer


def replying(content: Any, status: int = 200) -> Answer:
    async def answer(asked: Asked, request: web.Request) -> web.StreamResponse:
        return web.json_response(content, status=status)

    return answer


@dataclass
class OpenAiServer:
    """`answers` by path; others are 404 as FastAPI has it."""

    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    asked: list[Asked] = field(default_factory=list[Asked])
    hung_up: list[str] = field(default_factory=list[str])
    url: str = ""
    key: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": OWN_NAME, "object": "model"}]})
        asked = Asked(request.path, await request.read(), dict(request.headers))
        answer = self.answers.get(request.path)
        if answer is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if asked.raw == b"{}":
            return web.json_response({"error": {"message": "field required"}}, status=400)
        self.asked.append(asked)
        try:
            return await answer(asked, request)
        except (asyncio.CancelledError, ConnectionError):
            self.hung_up.append(request.path)
            raise


@asynccontextmanager
async def openai_server(answers: dict[str, Answer] | None = None, key: str = "") -> AsyncGenerator[OpenAiServer]:
    found = OpenAiServer(answers or {"/v1/chat/completions": streaming(*HELLO)}, key=key)
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_route("*", "/{path:.*}", found.answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    try:
        found.url = str(server.make_url("")).rstrip("/")
        yield found
    finally:
        await server.close()
