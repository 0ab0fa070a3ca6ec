"""Writes responses of the EMULATED server in Ollama's native format: whole, as stream lines, or as errors.

The other APIs are middlewares over the native handlers, as in the real server: their sinks convert native responses to
their own formats (`router.lab.emulator.openai_api`, `.anthropic_api`, `.responses_api`).
"""

from __future__ import annotations

from typing import Any

from router.lab.emulator.go_json import dump
from router.lab.emulator.http_server import Response

JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"


class ApiError(Exception):
    """Ends a request with a status and a message. `is_late`: the response stream had already been opened."""

    def __init__(self, status: int, message: str, is_late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.is_late = is_late


class Sink:
    """Writes native responses unchanged."""

    def __init__(self, response: Response, is_pre_0_12: bool = False) -> None:
        self.response = response
        self._is_old = is_pre_0_12

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        """Writes the whole response."""
        self.response.send_whole(status, dump(value), content_type)

    async def line(self, value: Any) -> None:
        """Writes and flushes one line of a stream."""
        await self.response.chunk(dump(value) + b"\n", NDJSON)

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        """Writes an error: as the whole response, or as the last line of a stream that has started.

        `streams`: a stream was requested, so that even an error is sent as a chunk; before 0.12 as a line of the stream
        with status 200.
        """
        if self.response.started or (streams and self._is_old):
            await self.line({"error": message})
        elif streams:
            await self.response.chunk(dump({"error": message}), PLAIN_JSON, status)
        else:
            await self.single(status, {"error": message})


async def send_error_body(response: Response, status: int, data: bytes, streams: bool) -> None:
    """Sends an error as the whole response; `streams` (requested): as a chunk, as a real server does."""
    if streams:
        await response.chunk(data, PLAIN_JSON, status)
    else:
        response.send_whole(status, data, PLAIN_JSON)


async def write_error(response: Response, status: int, message: str) -> None:
    """Writes an error in the native format."""
    await Sink(response).single(status, {"error": message})
