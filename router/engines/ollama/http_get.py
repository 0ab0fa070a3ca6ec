"""GET requests over raw HTTP/1.1 connections, for what the router asks its servers again and again.

Such a request costs a fifth of what it costs through a client library. Plain HTTP only. Nothing has a deadline here but
the making of a connection: callers set one, and a call that is cancelled closes its connection.
"""

from __future__ import annotations

import asyncio
from typing import cast
from urllib.parse import urlsplit

from router.http1.body_framing import MORE, Body, Chunked, FramingError
from router.http1.parser import HeadError, ReplyHead

CONNECT_SECONDS = 5.0

Reply = tuple[int, bytes]
"""Status and body."""


class _NoReply(ConnectionError):
    """The connection ended before the first byte of a reply."""


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    __slots__ = ("_body", "_head", "_loop", "_payload", "_reply", "is_reusable", "transport")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.is_reusable = False
        """Whether the last reply was whole and left the connection open."""
        self._reply: asyncio.Future[Reply] | None = None
        self._head = ReplyHead()
        self._body: Body | None = None
        self._payload: list[bytes] = []

    async def ask(self, request: bytes) -> Reply:
        """Sends the request and returns its reply; closes the connection if that fails or is cancelled."""
        self.is_reusable = False
        self._head, self._body, self._payload = ReplyHead(), None, []
        self._reply = self._loop.create_future()
        self.transport.write(request)
        try:
            return await self._reply
        finally:
            self._reply = None
            if not self.is_reusable:
                self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None or reply.done():
            self.is_reusable = False
            self.transport.abort()  # nothing was requested
            return
        try:
            self._read(data, reply)
        except (HeadError, FramingError) as error:
            reply.set_exception(ConnectionError(f"unreadable reply: {error}"))

    def _read(self, data: bytes, reply: asyncio.Future[Reply]) -> None:
        start = 0
        if self._body is None:
            start = self._head.feed(data)
            if start < 0:
                return
            self._body = self._head.body(payload=self._payload)
        end = self._body.feed(data, start)
        if not isinstance(self._body, Chunked):
            self._payload.append(data[start:] if end == MORE else data[start:end])
        if end != MORE:
            self.is_reusable = self._head.keep_alive and end == len(data)
            reply.set_result((self._head.status, b"".join(self._payload)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        reply = self._reply
        if reply is None or reply.done():
            return
        if self._body is not None and self._body.closed():
            reply.set_result((self._head.status, b"".join(self._payload)))
        elif self._body is None and not self._head.is_begun:
            reply.set_exception(_NoReply(str(exc or "the server closed the connection without a reply")))
        else:
            reply.set_exception(ConnectionError(str(exc or "the connection was lost within the reply")))


def is_plain(base_url: str) -> bool:
    """Whether the URL needs nothing but plain HTTP: no TLS, no credentials."""
    return base_url.startswith("http://") and "@" not in base_url


async def get_once(base_url: str, path: str) -> Reply:
    """Asks over a new connection, and closes it.

    Raises:
        OSError: no connection within CONNECT_SECONDS, or it was lost.
    """
    connection = await _open(base_url)
    try:
        return await connection.ask(_request(base_url, path, "close"))
    finally:
        connection.transport.abort()


class KeptConnections:
    """Connections by server, kept open between requests. For one event loop; `close` at the end."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}
        self._closed = False

    async def get(self, base_url: str, path: str) -> Reply:
        """Asks over an idle connection, else over a new one.

        Raises:
            OSError: no connection within CONNECT_SECONDS, or it was lost.
        """
        request = _request(base_url, path, "keep-alive")
        idle = self._idle.setdefault(base_url, [])
        while idle:
            kept = idle.pop()
            if not kept.is_reusable:
                continue
            try:
                return await self._ask(kept, request, idle)
            except _NoReply:
                pass  # the server had closed it meanwhile: nothing was done
        return await self._ask(await _open(base_url), request, idle)

    async def _ask(self, connection: _Connection, request: bytes, idle: list[_Connection]) -> Reply:
        reply = await connection.ask(request)
        if connection.is_reusable and self._closed:
            connection.transport.abort()
        elif connection.is_reusable:
            idle.append(connection)
        return reply

    def close(self) -> None:
        self._closed = True
        for idle in self._idle.values():
            while idle:
                idle.pop().transport.abort()


def _request(base_url: str, path: str, connection: str) -> bytes:
    host = base_url.removeprefix("http://")
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n\r\n".encode()


async def _open(base_url: str) -> _Connection:
    parts, loop = urlsplit(base_url), asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(
                lambda: _Connection(loop), parts.hostname or "", parts.port or 80
            )
    except TimeoutError as error:
        raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from error
    return connection
