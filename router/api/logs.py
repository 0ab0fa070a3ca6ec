"""`GET /llamayard/logs`: the last lines that the servers have written, and with `follow` those that come.

One JSON object a line: `instance`, `line`. An empty line keeps an idle connection known to be alive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from router.control.controller import Controller
from router.errors import BadRequest
from router.http1.headers import UNBUFFERED
from router.llm_api.errors import NDJSON

LOGS = "/llamayard/logs"
_LINES_DEFAULT = 100
_LINES_MAX = 10_000
_PAUSE_SECONDS = 1.0
"""After this without a line, it is looked whether the router is ending; then an empty line is sent."""


class Line(Protocol):
    """A line of a server's output."""

    @property
    def number(self) -> int: ...
    @property
    def instance(self) -> str: ...
    @property
    def text(self) -> str: ...


class Output(Protocol):
    """The output of all servers, bounded."""

    @property
    def instances(self) -> Sequence[str]: ...

    def after(self, number: int, instance: str | None = None) -> Sequence[Line]: ...

    async def grown(self) -> None: ...


async def send_logs(
    request: web.BaseRequest, output: Output, controller: Controller, extra: Mapping[str, str]
) -> web.StreamResponse:
    """Sends the lines; keys of the query: `instance`, `lines`, `follow`.

    Raises:
        BadRequest: a key is wrong.
    """
    instance = _instance(request.query.get("instance"), output, controller)
    count = _count(request.query.get("lines", str(_LINES_DEFAULT)))
    follow = _is_yes(request.query.get("follow", "false"))
    lines = output.after(0, instance)
    last = lines[-1].number if lines else 0
    response = web.StreamResponse(headers=dict([("Content-Type", NDJSON), UNBUFFERED, *extra.items()]))
    await response.prepare(request)
    await response.write(_encoded(lines[len(lines) - count :] if count < len(lines) else lines))
    while follow and not controller.is_closing:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_SECONDS):
                await output.grown()
        lines = output.after(last, instance)
        last = lines[-1].number if lines else last
        await response.write(_encoded(lines) or b"\n")  # fails once the client is gone
    await response.write_eof()
    return response


def _encoded(lines: Sequence[Line]) -> bytes:
    return b"".join(msgspec.json.encode({"instance": line.instance, "line": line.text}) + b"\n" for line in lines)


def _instance(text: str | None, output: Output, controller: Controller) -> str | None:
    known = {*output.instances, *controller.snapshot().instances}
    if text is not None and text not in known:
        raise BadRequest(f"instance: there is no instance '{text}'; there are: {', '.join(sorted(known)) or 'none'}")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _LINES_MAX):
        raise BadRequest(f"lines: must be a whole number from 0 to {_LINES_MAX}, not {text!r}")
    return int(text)


def _is_yes(text: str) -> bool:
    if text not in ("true", "1", "false", "0"):
        raise BadRequest(f"follow: must be true or false, not {text!r}")
    return text in ("true", "1")
