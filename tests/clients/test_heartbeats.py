"""Clients ignore the router's heartbeats, and raise an error that follows them.

A test server that only sends heartbeats replaces a router whose model is loading; the bytes are the router's own,
including progress comments.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from router.errors import LoadFailed
from router.llm_api.body_reader import parse_body
from router.llm_api.errors import SSE
from router.llm_api.heartbeat_format import heartbeat_for
from router.scheduler.queue.wait_estimate import WaitEstimate
from tests.clients.commands import command
from tests.support.ollama_server import real_binary

_WORDS = ("one", " two")
_ERROR = LoadFailed("the load came to nothing")
_SECONDS = 300


async def _answer(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    heartbeat = heartbeat_for(request.path, parse_body(body, request.path), request.headers.get, 10.0)
    assert heartbeat is not None
    response = web.StreamResponse(headers=dict(heartbeat.headers))
    await response.prepare(request)
    for position in (3, 2, 1):
        await response.write(heartbeat.piece)
        if heartbeat.content_type == SSE:
            await response.write(
                heartbeat.progress_piece(WaitEstimate(position, 4.5 * position, "it is being loaded on gpu0"))
            )
    if json.loads(body)["model"] == "fails":
        await response.write(heartbeat.late_error(_ERROR))
    else:
        for piece in _stream(request.path, json.loads(body)):
            await response.write(piece)
    await response.write_eof()
    return response


def _stream(path: str, body: dict[str, Any]) -> list[bytes]:
    """An answer of two words in the format of the path's API."""
    if path == "/v1/messages":
        return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in _anthropic_events()]
    if path.startswith("/v1/"):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "works"}
        choices = ({"index": 0, "delta": {"role": "assistant", "content": w}, "finish_reason": None} for w in _WORDS)
        events = [{**chunk, "choices": [choice]} for choice in choices]
        return [*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"]
    if not body.get("prompt") and not body.get("messages"):
        return [json.dumps(_line("", done=True)).encode()]
    return [json.dumps(line).encode() + b"\n" for line in (*map(_line, _WORDS), _line("", done=True))]


def _line(word: str, *, done: bool = False) -> dict[str, Any]:
    text_fields = {"message": {"role": "assistant", "content": word}, "response": word}
    return {"model": "works", "created_at": "2026-01-01T00:00:00Z", **text_fields, "done": done}


def _anthropic_events() -> list[dict[str, Any]]:
    usage = {"input_tokens": 1, "output_tokens": 0}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "works", "content": [], "usage": usage}
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": w}} for w in _WORDS]
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        {"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]


async def _show(request: web.Request) -> web.Response:
    return web.json_response({"details": {"family": "llama"}, "model_info": {}, "capabilities": ["completion"]})


@asynccontextmanager
async def _heartbeat_server() -> AsyncGenerator[str]:
    """A server that keeps every client waiting; yields its URL."""
    app = web.Application()
    app.router.add_get("/", _running)
    app.router.add_post("/api/show", _show)
    for path in ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages"):
        app.router.add_post(path, _answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _running(request: web.Request) -> web.Response:
    return web.Response(text="Ollama is running")


async def _output(program: Sequence[str], **environment: str) -> str:
    """Runs a program, which must succeed; returns its standard output."""
    full_environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TERM": "dumb", **environment}
    pipe = asyncio.subprocess.PIPE
    devnull = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *program, env=full_environment, stdin=devnull, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(_SECONDS):
        output, error = await process.communicate()
    assert process.returncode == 0, (output, error)
    return output.decode()


def _is_unaffected(outcome: list[str]) -> bool:
    works, fails = outcome
    return works == "one two" and fails.startswith("raised ") and _ERROR.message in fails


async def test_ollama_and_openai_ignore_heartbeats() -> None:
    async with _heartbeat_server() as url:
        outcomes = json.loads(await _output([*command("heartbeats_light.py", light=True), url]))
    assert [name for name, outcome in outcomes.items() if not _is_unaffected(outcome)] == []


@pytest.mark.clients
async def test_other_packages_ignore_heartbeats() -> None:
    async with _heartbeat_server() as url:
        outcomes = json.loads(await _output([*command("heartbeats_other.py"), url]))
    assert [name for name, outcome in outcomes.items() if not _is_unaffected(outcome)] == []


@pytest.mark.clients
async def test_the_npm_packages_ignore_heartbeats_without_warnings() -> None:
    async with _heartbeat_server() as url:
        outcomes = json.loads(await _output([*command("heartbeats.mjs"), url]))
    assert outcomes.pop("complaints") == []
    assert [name for name, outcome in outcomes.items() if not _is_unaffected(outcome)] == []


@pytest.mark.ollama
async def test_the_go_client_ignores_heartbeats() -> None:
    async with _heartbeat_server() as url:
        output = await _output([str(real_binary()), "run", "works", "hi"], OLLAMA_HOST=url)
    assert "one two" in output
