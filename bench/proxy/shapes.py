"""Requests as real clients write them: their headers, and their bodies with the members in the order they send.

Recorded from the client packages (versions below) with a server that prints what comes; Open WebUI's from its source
(`backend/open_webui/utils/payload.py`). Only names, numbers and texts are chosen here. The `bare` shape is one that no
client sends: a router has nothing to read but the model, and nothing to change.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_QUESTION = "Why is the sky blue?"
_BASE64 = base64.b64encode(bytes(range(256)) * 3).decode()
"""What long texts are filled with: images make bodies long."""
_OPTIONS = {"num_ctx": 32768, "temperature": 0.7}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{text}. Call it once for each {argument}.",
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": f"The {argument}, as the user wrote it"}},
                "required": [argument],
            },
        },
    }
    for name, text, argument in (
        ("get_weather", "The current weather of a city", "city"),
        ("read_file", "The text of a file in the workspace", "path"),
        ("run_command", "Runs a shell command and returns its output", "command"),
    )
]

_BENCH_HEADERS = ("User-Agent: bench/1", "Accept: */*", "Content-Type: application/json")
_AIOHTTP_HEADERS = (
    "Content-Type: application/json", "Accept: */*", "Accept-Encoding: gzip, deflate",
    "User-Agent: Python/3.11 aiohttp/3.12.15",
)  # fmt: skip
_OLLAMA_HEADERS = (
    "Accept-Encoding: gzip, deflate, zstd", "Connection: keep-alive", "content-type: application/json",
    "accept: application/json", "user-agent: ollama-python/0.6.3 (x86_64 linux) Python/3.11.7",
)  # fmt: skip
_OPENAI_HEADERS = (
    "Accept-Encoding: gzip, deflate", "Connection: keep-alive", "authorization: Bearer ollama",
    "accept: application/json", "content-type: application/json", "user-agent: OpenAI/Python 3.57.0",
    "x-stainless-lang: python", "x-stainless-package-version: 3.57.0", "x-stainless-os: Linux",
    "x-stainless-arch: x64", "x-stainless-runtime: CPython", "x-stainless-runtime-version: 3.11.7",
    "x-stainless-async: false", "x-stainless-retry-count: 0", "x-stainless-read-timeout: 600",
)  # fmt: skip

Members = Callable[[str, bool], dict[str, Any]]
"""The body's members by the user's text and `stream`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How one client writes a request."""

    client: str
    path: str
    headers: tuple[str, ...]
    members: Members
    text: str = _QUESTION
    is_compact: bool = True
    """Whether the JSON has no spaces; aiohttp's and requests' `json=` have some."""

    def request(self, more: int, *, stream: bool, query: str = "") -> bytes:
        """One whole request; `more`: bytes to be added to the user's text."""
        members = self.members(self.text + _filler(more), stream)
        separators = (",", ":") if self.is_compact else (", ", ": ")
        body = json.dumps(members, ensure_ascii=not self.is_compact, separators=separators).encode()
        lines = (
            f"POST {self.path}{query} HTTP/1.1", "Host: 127.0.0.1:11434", *self.headers, f"Content-Length: {len(body)}",
        )  # fmt: skip
        return "\r\n".join((*lines, "", "")).encode() + body


def _filler(size: int) -> str:
    return (_BASE64 * (size // len(_BASE64) + 1))[:size]


def _user(text: str, **more: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": text, **more}]


def _bare(text: str, stream: bool) -> dict[str, Any]:
    return {"model": "bench", "messages": _user(text), "stream": stream}


def _open_webui(text: str, stream: bool) -> dict[str, Any]:
    return {"model": "bench", "messages": _user(text), "stream": stream, "options": _OPTIONS, "keep_alive": "5m"}


def _with_image(text: str, stream: bool) -> dict[str, Any]:
    return {**_open_webui(text, stream), "messages": _user(text, images=[_filler(2_000_000)])}


def _ollama_python(text: str, stream: bool) -> dict[str, Any]:
    return {"model": "bench", "stream": stream, "messages": _user(text), "tools": []}


def _langchain(text: str, stream: bool) -> dict[str, Any]:
    return {
        "model": "bench", "stream": stream, "options": _OPTIONS, "keep_alive": "5m", "messages": _user(text),
        "tools": [],
    }  # fmt: skip


def _openai_tools(text: str, stream: bool) -> dict[str, Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"model": "bench", "messages": _user(text), **options, "temperature": 0.2, "tools": _TOOLS}


_SOURCE = 'def read(path: str) -> str:\n    """The text of a file."""\n    with open(path, encoding="utf-8") as file:\n'


def _agent(text: str, stream: bool) -> dict[str, Any]:
    """A coding agent in its twentieth turn: each turn calls a tool and gets some source code."""
    messages: list[dict[str, object]] = [{"role": "system", "content": "You are a careful programmer.\n" * 200}]
    for turn in range(20):
        call = {
            "id": f"call_{turn}", "type": "function",
            "function": {"name": "read_file", "arguments": json.dumps({"path": f"src/module_{turn}.py"})},
        }  # fmt: skip
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": _SOURCE * 38})
    return {**_openai_tools(text, stream), "messages": messages + _user(text), "max_tokens": 4096}


SHAPES: Mapping[str, Shape] = {
    "bare": Shape("nobody", "/api/chat", _BENCH_HEADERS, _bare),
    "open-webui": Shape("Open WebUI", "/api/chat", _AIOHTTP_HEADERS, _open_webui, is_compact=False),
    "langchain": Shape("langchain-ollama 1.1 (ChatOllama)", "/api/chat", _OLLAMA_HEADERS, _langchain),
    "ollama-python": Shape("ollama 0.6 (Client.chat)", "/api/chat", _OLLAMA_HEADERS, _ollama_python),
    "openai-tools": Shape("openai 3.57 with three tools", "/v1/chat/completions", _OPENAI_HEADERS, _openai_tools),
    "agent": Shape("openai 3.57, an agent's 100 KB prompt", "/v1/chat/completions", _OPENAI_HEADERS, _agent),
    "image": Shape("Open WebUI, one image of 2 MB", "/api/chat", _AIOHTTP_HEADERS, _with_image, is_compact=False),
}
"""By the name in the names of phases."""
