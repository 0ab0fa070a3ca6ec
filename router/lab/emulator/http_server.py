"""HTTP/1.1 for the EMULATED server, framed as Go's net/http frames it.

Answers up to 2 kB that were not flushed carry a length, longer ones and streams are chunked, each write of a stream one
chunk; no server header, no compression, no time limits. Requests on one connection are answered one after another. It
knows no path and no model. Kinder than the truth: a request with both Content-Length and Transfer-Encoding is refused,
and header names are not checked for their spelling.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools  # pyright: ignore[reportMissingTypeStubs]

_SHORT_BYTES = 2048
"""Up to here Go's buffer holds an answer back until its length is known."""
_DRAIN_BYTES = 256 << 10
"""An unread body up to this size is read and dropped after the answer; over it the connection is closed."""
_UNREAD_BYTES = 1 << 20
"""A body is read no further ahead of its handler than this."""


class ClientLeftError(Exception):
    """The client closed its side of the connection while its request was being watched."""


class Request:
    """One request; the body may still be on its way."""

    def __init__(self, connection: _Connection, method: str, target: str, version: str) -> None:
        self.method = method
        self.target = target
        self.path = unquote(target.partition("?")[0])
        self.version = version
        self.headers: dict[str, str] = {}
        """By lower-cased name; the last one of several."""
        self.left = asyncio.Event()
        """The client has closed its side, or the connection broke."""
        self.complete = False
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._more = asyncio.Event()
        self._watching: asyncio.Task[Any] | None = None
        self._continues = False

    @property
    def length(self) -> int:
        """The announced length; 0 where there is none."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else 0

    @property
    def peer(self) -> str:
        return self._connection.peer

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Within the block, the departure of the client ends whatever is waited for.

        Raises:
            ClientLeftError: it has left, before or within the block.
        """
        if self.left.is_set():
            raise ClientLeftError
        self._watching = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.left.is_set() and self._watching is not None:
                self._watching.uncancel()
                raise ClientLeftError from None
            raise
        finally:
            self._watching = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises ClientLeftError where it breaks off."""
        if self.headers.get("expect", "").lower() == "100-continue" and not self._continues and not self.complete:
            self._continues = True
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._unread -= len(chunk)
                self._connection.read_on(self._unread < _UNREAD_BYTES)
                yield chunk
            if self.complete:
                return
            if self.left.is_set():
                raise ClientLeftError
            self._more.clear()
            await self._more.wait()

    async def body(self) -> bytes:
        """All of the body."""
        return b"".join([chunk async for chunk in self.chunks()])

    # --- for the connection ---

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self._unread += len(data)
        self._connection.read_on(self._unread < _UNREAD_BYTES)
        self._more.set()

    def end(self) -> None:
        self.complete = True
        self._more.set()

    def abandon(self) -> None:
        self.left.set()
        self._more.set()
        if self._watching is not None:
            self._watching.cancel()


class Response:
    """The answer to one request."""

    def __init__(self, connection: _Connection, request: Request, keeps: bool) -> None:
        self.headers: dict[str, str] = {}
        """Sent with the head, after what `whole` and `chunk` set."""
        self.status = 200
        self.begun = False
        self.ended = False
        self._connection = connection
        self._request = request
        self._keeps = keeps
        self._chunked = False

    @property
    def closes(self) -> bool:
        """The connection ends with this answer."""
        return not self._keeps

    def whole(self, status: int, body: bytes = b"", content_type: str | None = None) -> None:
        """The whole answer at once."""
        is_long = len(body) > _SHORT_BYTES and self._request.method != "HEAD"
        length = None if is_long or status == HTTPStatus.NO_CONTENT else len(body)
        self._head(status, content_type, length)
        self._body(body)
        self.end()

    async def chunk(self, data: bytes, content_type: str | None = None, status: int = 200) -> None:
        """One flushed write; the first one sends the head. Waits while the client does not read."""
        if not self.begun:
            self._head(status, content_type, None)
        self._body(data)
        await self._connection.writable()

    def end(self) -> None:
        """The last chunk, where there are chunks."""
        if self.ended:
            return
        self.ended = True
        if not self.begun:
            self._head(self.status, None, 0)
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")

    def _body(self, data: bytes) -> None:
        if self._request.method == "HEAD" or not data:
            return
        self._connection.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def _head(self, status: int, content_type: str | None, length: int | None) -> None:
        self.begun = True
        self.status = status
        has_body = status != HTTPStatus.NO_CONTENT and self._request.method != "HEAD"
        self._chunked = has_body and length is None and self._request.version == "1.1"
        if has_body and length is None and not self._chunked:
            self._keeps = False  # an older client knows the end by the close
        if not self._request.complete and self._request.length > _DRAIN_BYTES:
            self._keeps = False
        headers = dict(self.headers)
        if content_type is not None:
            headers["Content-Type"] = content_type
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        for name in sorted(headers):
            lines += [f"{name}: {value}" for value in headers[name].split("\n")]
        lines.append(f"Date: {datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT")
        lines += [f"Content-Length: {length}"] if length is not None else []
        lines += ["Transfer-Encoding: chunked"] if self._chunked else []
        if not self._keeps:
            lines.append("Connection: close")
        elif self._request.version == "1.0" and "Connection" not in headers:
            lines.append("Connection: keep-alive")
        self._connection.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


Handler = Callable[[Request, Response], Awaitable[None]]


class _Connection(asyncio.Protocol):
    """One client's connection: parses, queues, answers."""

    def __init__(self, handler: Handler, owned: set[asyncio.Task[None]]) -> None:
        self.peer = ""
        self._handler = handler
        self._owned = owned
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: asyncio.Queue[tuple[Request, bool] | None] = asyncio.Queue()
        self._arriving: Request | None = None
        self._current: Request | None = None
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._is_paused = False
        self._at_eof = False

    # --- the transport's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        task = asyncio.get_running_loop().create_task(self._serve())
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # nothing is upgraded; the request itself was taken
        except httptools.HttpParserError:
            self._refuse("400 Bad Request")

    def eof_received(self) -> bool:
        """Keeps the other direction open: a handler may still answer, or never end."""
        self._leave()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol names it)
        self._is_writable.set()
        self._leave()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    def _leave(self) -> None:
        self._at_eof = True
        for request in (self._current, self._arriving):
            if request is not None:
                request.abandon()
        self._queue.put_nowait(None)

    def _refuse(self, text: str) -> None:
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{text}"
        self.write(head.encode())
        self.close()

    # --- the parser's calls ---

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        method = self._parser.get_method().decode("latin-1")
        request = Request(self, method, self._target.decode("latin-1"), self._parser.get_http_version())
        request.headers.update(self._headers)
        if request.version == "1.1" and "host" not in request.headers:
            self._refuse("400 Bad Request: missing required Host header")
            return
        self._arriving = request
        self._queue.put_nowait((request, bool(self._parser.should_keep_alive())))

    def on_body(self, body: bytes) -> None:
        if self._arriving is not None:
            self._arriving.feed(body)

    def on_message_complete(self) -> None:
        if self._arriving is not None:
            self._arriving.end()
            self._arriving = None

    # --- answering ---

    async def _serve(self) -> None:
        while (item := await self._queue.get()) is not None:
            request, keeps = item
            self._current = request
            response = Response(self, request, keeps)
            if self._at_eof:
                request.abandon()
            with contextlib.suppress(ClientLeftError):
                await self._handled(request, response)
            response.end()
            self._current = None
            if response.closes or not await self._dropped(request):
                break
        self.close()

    async def _handled(self, request: Request, response: Response) -> None:
        try:
            await self._handler(request, response)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not request.left.is_set() or task is None:
                raise
            task.uncancel()  # it came of the client's leaving, while something was written

    async def _dropped(self, request: Request) -> bool:
        """Reads what is left of the body; False where the connection is to be closed instead."""
        try:
            async for _ in request.chunks():
                pass
        except ClientLeftError:
            return False
        return True

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def writable(self) -> None:
        await self._is_writable.wait()

    def read_on(self, wanted: bool) -> None:
        if self._transport is None or self._transport.is_closing() or wanted != self._is_paused:
            return
        self._is_paused = not wanted
        (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def listen(handler: Handler, host: str, port: int, owned: set[asyncio.Task[None]]) -> asyncio.Server:
    """Accepts connections from now on; `owned` keeps their tasks. Raises OSError where the address is taken."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: _Connection(handler, owned), host, port, backlog=1024)


def header_values(headers: Mapping[str, str], name: str) -> list[str]:
    """The comma-separated values of a header."""
    return [part.strip() for part in headers.get(name, "").split(",") if part.strip()]
