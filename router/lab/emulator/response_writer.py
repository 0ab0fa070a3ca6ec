"""How answers of the EMULATED server are written: whole, as lines of a stream, or as errors, in Ollama's own shape.

The other APIs are middlewares over the native handlers, as in the real server: their sinks take the native answers and
write them in their own shapes (`router.lab.emulator.openai_api`, `.anthropic`, `.responses`).
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
    """A request ends with this status and text. `is_late`: a stream had been opened for the answer by then."""

    def __init__(self, status: int, message: str, is_late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.is_late = is_late


class Sink:
    """Takes the native API's answers and writes them as they are."""

    def __init__(self, response: Response, is_old: bool = False) -> None:
        self.response = response
        self._is_old = is_old

    async def single(self, status: int, value: Any, content_type: str = JSON) -> None:
        """The whole answer."""
        self.response.whole(status, dump(value), content_type)

    async def line(self, value: Any) -> None:
        """One line of a stream, flushed."""
        await self.response.chunk(dump(value) + b"\n", NDJSON)

    async def fail(self, status: int, message: str, streams: bool = False) -> None:
        """An error: the whole answer, or in a stream that has begun its last line.

        `streams`: the request asked for a stream, whose first flush sends even an error in a chunk; before 0.12 as a
        line of the stream, status 200.
        """
        if self.response.begun or (streams and self._is_old):
            await self.line({"error": message})
        elif streams:
            await self.response.chunk(dump({"error": message}), PLAIN_JSON, status)
        else:
            await self.single(status, {"error": message})


async def refuse(response: Response, status: int, message: str) -> None:
    """An error in the native shape, whatever the API."""
    await Sink(response).single(status, {"error": message})
