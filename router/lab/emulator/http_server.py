"""HTTP/1.1 server of the EMULATED Ollama, with the framing of Go's net/http.

Unflushed responses up to 2 kB have a Content-Length; longer ones and streams are chunked, with one chunk per write. No
Server header, no compression, no timeouts. Requests on one connection are answered in order. Knows no paths and no
models. Differences from Go: a request with both Content-Length and Transfer-Encoding is refused, and header names are
not validated.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools  # pyright: ignore[reportMissingTypeStubs]

_SHORT_BYTES = 2048
"""Go buffers a response up to this size, so that its length is known."""
_DRAIN_BYTES = 256 << 10
"""An unread body up to this size is drained after the response; with a larger one the connection is closed."""
_UNREAD_BYTES = 1 << 20
"""Maximum body bytes read ahead of the handler."""


_ABSOLUTE = re.compile(r"https?://(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE)


class ClientDisconnectedError(Exception):
    """The client closed its side of the connection."""


class Request:
    """One request; the body may still be arriving."""

    def __init__(self, connection: _Connection, method: str, target: str, version: str) -> None:
        self.method = method
        absolute = _ABSOLUTE.match(target)
        self._authority = absolute[1] if absolute is not None else ""
        self.target = target if absolute is None else target[absolute.end() :]
        self.path = unquote(self.target.partition("?")[0])
        self.version = version
        self.headers: dict[str, str] = {}
        """By lower-case name; the last value if repeated."""
        self.disconnected = asyncio.Event()
        """Set when the client closed its side or the connection broke."""
        self.complete = False
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._unread_bytes = 0
        self._body_event = asyncio.Event()
        self._cancellable_task: asyncio.Task[Any] | None = None
        self._sent_continue = False

    @property
    def length(self) -> int:
        """The Content-Length; 0 if there is none."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else 0

    @property
    def host(self) -> str:
        """The authority of a target in absolute form, otherwise the Host header."""
        return self._authority or self.headers.get("host", "")

    @property
    def peer(self) -> str:
        return self._connection.peer

    @contextlib.contextmanager
    def cancel_on_disconnect(self) -> Generator[None]:
        """Within the block, a disconnect of the client cancels what the task awaits.

        Raises:
            ClientDisconnectedError: the client disconnected, before or within the block.
        """
        if self.disconnected.is_set():
            raise ClientDisconnectedError
        self._cancellable_task = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.disconnected.is_set() and self._cancellable_task is not None:
                self._cancellable_task.uncancel()
                raise ClientDisconnectedError from None
            raise
        finally:
            self._cancellable_task = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The body as it arrives. Raises ClientDisconnectedError if it is cut off."""
        if self.headers.get("expect", "").lower() == "100-continue" and not self._sent_continue and not self.complete:
            self._sent_continue = True
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._unread_bytes -= len(chunk)
                self._connection.set_reading(self._unread_bytes < _UNREAD_BYTES)
                yield chunk
            if self.complete:
                return
            if self.disconnected.is_set():
                raise ClientDisconnectedError
            self._body_event.clear()
            await self._body_event.wait()

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    # --- called by the connection ---

    def add_data(self, data: bytes) -> None:
        self._chunks.append(data)
        self._unread_bytes += len(data)
        self._connection.set_reading(self._unread_bytes < _UNREAD_BYTES)
        self._body_event.set()

    def end(self) -> None:
        self.complete = True
        self._body_event.set()

    def disconnect(self) -> None:
        self.disconnected.set()
        self._body_event.set()
        if self._cancellable_task is not None:
            self._cancellable_task.cancel()


class Response:
    """The response to one request."""

    def __init__(self, connection: _Connection, request: Request, keep_alive: bool) -> None:
        self.headers: dict[str, str] = {}
        """Sent in addition to the headers that `send_whole` and `chunk` set."""
        self.status = 200
        self.started = False
        self.ended = False
        self._connection = connection
        self._request = request
        self._keep_alive = keep_alive
        self._is_chunked = False

    @property
    def closes(self) -> bool:
        """The connection is closed after this response."""
        return not self._keep_alive

    def send_whole(self, status: int, body: bytes = b"", content_type: str | None = None) -> None:
        """Sends the whole response."""
        is_long = len(body) > _SHORT_BYTES and self._request.method != "HEAD"
        length = None if is_long or status == HTTPStatus.NO_CONTENT else len(body)
        self._head(status, content_type, length)
        self._body(body)
        self.end()

    async def chunk(self, data: bytes, content_type: str | None = None, status: int = 200) -> None:
        """Sends one flushed write; the first also sends the head. Waits while the client does not read."""
        if not self.started:
            self._head(status, content_type, None)
        self._body(data)
        await self._connection.writable()

    def end(self) -> None:
        """Ends the response, with the last chunk if it is chunked."""
        if self.ended:
            return
        self.ended = True
        if not self.started:
            self._head(self.status, None, 0)
        if self._is_chunked:
            self._connection.write(b"0\r\n\r\n")

    def _body(self, data: bytes) -> None:
        if self._request.method == "HEAD" or not data:
            return
        self._connection.write(b"%x\r\n%s\r\n" % (len(data), data) if self._is_chunked else data)

    def _head(self, status: int, content_type: str | None, length: int | None) -> None:
        self.started = True
        self.status = status
        has_body = status != HTTPStatus.NO_CONTENT and self._request.method != "HEAD"
        self._is_chunked = has_body and length is None and self._request.version == "1.1"
        if has_body and length is None and not self._is_chunked:
            self._keep_alive = False  # an HTTP/1.0 client detects the end by the close
        if not self._request.complete and self._request.length > _DRAIN_BYTES:
            self._keep_alive = False
        headers = dict(self.headers)
        if content_type is not None:
            headers["Content-Type"] = content_type
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        for name in sorted(headers):
            lines += [f"{name}: {value}" for value in headers[name].split("\n")]
        lines.append(f"Date: {datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT")
        lines += [f"Content-Length: {length}"] if length is not None else []
        lines += ["Transfer-Encoding: chunked"] if self._is_chunked else []
        if not self._keep_alive:
            lines.append("Connection: close")
        elif self._request.version == "1.0" and "Connection" not in headers:
            lines.append("Connection: keep-alive")
        self._connection.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


Handler = Callable[[Request, Response], Awaitable[None]]


class _Connection(asyncio.Protocol):
    """One client connection: parses and queues requests, and runs the handler for each in order."""

    def __init__(self, handler: Handler, tasks: set[asyncio.Task[None]]) -> None:
        self.peer = ""
        self._handler = handler
        self._tasks = tasks
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: asyncio.Queue[tuple[Request, bool] | None] = asyncio.Queue()
        self._incoming: Request | None = None
        self._current: Request | None = None
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._is_paused = False
        self._at_eof = False

    # --- called by the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        task = asyncio.get_running_loop().create_task(self._serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # upgrades are ignored; the request itself was parsed
        except httptools.HttpParserError:
            self._reject("400 Bad Request")

    def eof_received(self) -> bool:
        """Keeps the write side open: a handler may still answer, or never end."""
        self._disconnect()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (required by the protocol)
        self._is_writable.set()
        self._disconnect()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    def _disconnect(self) -> None:
        self._at_eof = True
        for request in (self._current, self._incoming):
            if request is not None:
                request.disconnect()
        self._queue.put_nowait(None)

    def _reject(self, text: str) -> None:
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{text}"
        self.write(head.encode())
        self.close()

    # --- called by the parser ---

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
            self._reject("400 Bad Request: missing required Host header")
            return
        self._incoming = request
        self._queue.put_nowait((request, bool(self._parser.should_keep_alive())))

    def on_body(self, body: bytes) -> None:
        if self._incoming is not None:
            self._incoming.add_data(body)

    def on_message_complete(self) -> None:
        if self._incoming is not None:
            self._incoming.end()
            self._incoming = None

    # --- responding ---

    async def _serve(self) -> None:
        while (item := await self._queue.get()) is not None:
            request, keep_alive = item
            self._current = request
            response = Response(self, request, keep_alive)
            if self._at_eof:
                request.disconnect()
            with contextlib.suppress(ClientDisconnectedError):
                await self._run_handler(request, response)
            response.end()
            self._current = None
            if response.closes or not await self._drain_body(request):
                break
        self.close()

    async def _run_handler(self, request: Request, response: Response) -> None:
        try:
            await self._handler(request, response)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not request.disconnected.is_set() or task is None:
                raise
            task.uncancel()  # caused by the client's disconnect during a write

    async def _drain_body(self, request: Request) -> bool:
        """Drains the rest of the body; False if the connection must be closed instead."""
        try:
            async for _ in request.chunks():
                pass
        except ClientDisconnectedError:
            return False
        return True

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def writable(self) -> None:
        await self._is_writable.wait()

    def set_reading(self, is_wanted: bool) -> None:
        if self._transport is None or self._transport.is_closing() or is_wanted != self._is_paused:
            return
        self._is_paused = not is_wanted
        (self._transport.resume_reading if is_wanted else self._transport.pause_reading)()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def listen(handler: Handler, host: str, port: int, tasks: set[asyncio.Task[None]]) -> asyncio.Server:
    """Starts accepting connections; `tasks` keeps their tasks. Raises OSError if the address is in use."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: _Connection(handler, tasks), host, port, backlog=1024)
