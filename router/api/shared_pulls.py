"""Pulls shared by several clients: a client that requests a model being pulled joins that pull and sees its progress.

One request goes to the server for all of them, under the store's write lock. A client that joins late gets the last
line of each step so far; one that reads slowly misses progress lines, but never a step. When the last client has left,
the pull is cancelled, as a server does; the fetched parts stay in the store for the next attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import aiohttp
import msgspec
import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from router.api.context import ApiContext
from router.api.management_rules import PullWatch
from router.engines.ollama.model_listing import key_of
from router.errors import UNREADABLE_JSON, InstanceLost, RouterError, WaitTimeout
from router.http1.headers import UNBUFFERED
from router.llm_api.body_reader import ParsedBody, last_value
from router.llm_api.errors import NDJSON, internal_error
from router.llm_api.json_edit import set_member
from router.observability.request_record import RequestRecord

_PATH = "/api/pull"
_WAITING = b'{"status":"waiting for another change of the store to end"}\n'
_LINE_BYTES_MAX = 1 << 20

_Step = tuple[str, str]


class _Line(msgspec.Struct):
    status: str = ""
    digest: str = ""
    error: str = ""
    completed: int = 0
    total: int = 0


class Pulls:
    """All pulls in progress."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._running: dict[tuple[str, bool], _Pull] = {}

    def progress(self) -> list[dict[str, object]]:
        """For the status document: each pull in progress. Bytes are those of the layers that have begun."""
        return [pull.progress(model) for (model, _), pull in self._running.items() if not pull.is_over]

    async def serve(
        self, request: web.BaseRequest, body: bytes, parsed: ParsedBody, record: RequestRecord
    ) -> web.StreamResponse:
        """Serves one client of a new or running pull."""
        name = parsed.model or ""
        key = (key_of(name) or name, _is_insecure(body))
        pull = self._running.get(key)
        if pull is None or pull.is_over:
            pull = self._running[key] = _Pull(self._context, set_member(body, "stream", b"true"), record.request_id)
        async with pull.joined() as pieces:
            try:
                return await (
                    _once(pieces, pull, record) if parsed.stream is False else _streamed(request, pieces, pull, record)
                )
            finally:
                if pull.clients == 1 and self._running.get(key) is pull:
                    del self._running[key]


class _Pull:
    """One pull: its own task, and the clients that follow it."""

    def __init__(self, context: ApiContext, body: bytes, request_id: str) -> None:
        """`request_id`: of the client that started it."""
        self._context = context
        self._body = body
        self._request_id = request_id
        self._steps: dict[_Step, bytes] = {}
        self._followers: set[_Follower] = set()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self.status = web.HTTPOk.status_code
        self.refusal: tuple[str, bytes] = ("", b"")
        """Content type and body of a reply with another status."""
        self.last = b""
        """Its last line."""
        self._started_at = datetime.now(UTC)
        self.failure: RouterError | None = None

    @property
    def is_over(self) -> bool:
        return self._task.done()

    @property
    def clients(self) -> int:
        return len(self._followers)

    def progress(self, model: str) -> dict[str, object]:
        last = _decoded(self.last)
        layers = [line for (_, digest), raw in self._steps.items() if digest and (line := _decoded(raw)).total]
        return {
            "model": model,
            "status": last.error or last.status,
            "digest": last.digest,
            "completed_bytes": sum(layer.completed for layer in layers),
            "total_bytes": sum(layer.total for layer in layers),
            "started_at": self._started_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "clients": self.clients,
        }

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator[_Follower]:
        follower = _Follower(self._steps)
        self._followers.add(follower)
        if self.is_over:
            follower.end()
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            if not self._followers and not self._task.done():
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            if self._context.writing.locked():
                self._publish(_WAITING)
            async with self._context.writing:
                try:
                    await self._download()
                finally:
                    self._context.catalog.forget_all()
        except RouterError as error:
            self.failure = error
        except (aiohttp.ClientError, OSError) as error:
            self.failure = self._context.cutoff.lost(f"the instance died during the pull: {error}", error)
        except Exception:  # the outermost edge of a task: followers must not mistake the end for success
            structlog.get_logger("router.api").exception("pull_crashed", request_id=self._request_id)
            self.failure = internal_error(self._request_id)
        finally:
            for follower in self._followers:
                follower.end()

    async def _download(self) -> None:
        url = (await self._context.ready_primary()).spec.url + _PATH
        headers = {"Content-Type": "application/json"}
        session = self._context.session
        async with session.post(url, data=self._body, headers=headers, allow_redirects=False) as reply:
            self.status = reply.status
            if reply.status != web.HTTPOk.status_code:
                self.refusal = (reply.headers.get("Content-Type", ""), await reply.read())
                return
            watch = PullWatch(self._context.management)
            while line := await self._next(reply.content):
                decoded = self._publish(line)
                watch.progressed(decoded.digest, decoded.total, decoded.completed)

    async def _next(self, content: aiohttp.StreamReader) -> bytes:
        seconds = self._context.limits.idle_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await content.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except (ValueError, HttpProcessingError) as error:  # a line longer than the reader accepts
            raise InstanceLost(f"invalid reply from the instance: {error}") from error
        except TimeoutError as error:
            raise WaitTimeout(f"the pull was silent for {seconds:.0f} s (stream.idle_timeout_seconds)") from error

    def _publish(self, line: bytes) -> _Line:
        self.last = line
        decoded = _decoded(line)
        step = decoded.error or decoded.status, decoded.digest
        self._steps.pop(step, None)  # the newest goes last
        self._steps[step] = line
        for follower in self._followers:
            follower.put(step, line)
        return decoded


class _Follower:
    """Lines not yet sent to one client: only the newest of each step."""

    def __init__(self, steps: dict[_Step, bytes]) -> None:
        self._pending = dict(steps)
        self._changed = asyncio.Event()
        self._ended = False
        if steps:
            self._changed.set()

    def put(self, step: _Step, line: bytes) -> None:
        self._pending.pop(step, None)
        self._pending[step] = line
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def next(self) -> list[bytes]:
        """Lines to send now; none once the pull is over."""
        await self._changed.wait()
        lines = list(self._pending.values())
        self._pending.clear()
        if not self._ended:
            self._changed.clear()
        return lines


async def _streamed(
    request: web.BaseRequest, pieces: _Follower, pull: _Pull, record: RequestRecord
) -> web.StreamResponse:
    lines = await pieces.next()
    if not lines:
        return _refused(pull, record)
    response = web.StreamResponse(
        headers=dict([("Content-Type", NDJSON), UNBUFFERED, *record.response_headers().items()])
    )
    await response.prepare(request)
    while lines:
        for line in lines:
            await response.write(line)
        lines = await pieces.next()
    if pull.failure is not None:
        record.error_code = pull.failure.code
        await response.write(msgspec.json.encode({"error": pull.failure.message}) + b"\n")
    await response.write_eof()
    return response


async def _once(pieces: _Follower, pull: _Pull, record: RequestRecord) -> web.StreamResponse:
    """Waits for the whole pull, as a server does: the last line is the response; an error has status 500."""
    while await pieces.next():
        continue
    if pull.failure is not None or pull.status != web.HTTPOk.status_code:
        return _refused(pull, record)
    body = pull.last.rstrip(b"\n")
    status = 500 if _decoded(body).error else 200
    return web.Response(
        status=status, body=body, headers={"Content-Type": "application/json", **record.response_headers()}
    )


def _refused(pull: _Pull, record: RequestRecord) -> web.StreamResponse:
    """The server's own reply if it was not a stream, or the error before it."""
    if pull.failure is not None:
        raise pull.failure
    content_type, body = pull.refusal
    headers = {**record.response_headers(), "Content-Type": content_type}
    return web.Response(status=pull.status, body=body, headers=headers)


def _decoded(line: bytes) -> _Line:
    try:
        return msgspec.json.decode(line, type=_Line)
    except UNREADABLE_JSON:
        return _Line(status=line.decode(errors="replace"))


def _is_insecure(body: bytes) -> bool:
    """Whether it accepts a registry without TLS: it is not shared with a pull that requires TLS."""
    return last_value(body, "insecure") == b"true"
