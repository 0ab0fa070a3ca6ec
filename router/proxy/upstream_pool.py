"""Connections to the servers, kept open between requests, with no limit on those in use.

A limit on connections would queue streams invisibly; slots bound them instead. An idle connection on which anything
comes, or which its server closes, is dropped at once. The user of a connection gets its bytes through `Receiver`, and
releases it only after the last byte of a whole reply. Nothing is retried here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

from router.http1.parser import ReplyHead
from router.proxy.interfaces import Send, discard

TOKEN_ENDS: Final = (b'"done":false}\n\r\n', b'"finish_reason":null}]}\n\n\r\n', b'"}}\n\n\r\n')
"""How a piece ends that is a token and not the last line of its stream. Nothing that is read from a stream's end, such
as token counts or errors, is in such a piece."""
ONE_CHUNK: Final = 1 << 40
_SIZE_LINES: Final = {len(b"%x\r\n" % size) + size + 2: b"%x\r\n" % size for size in range(16, 2048)}
"""Length of a whole chunk -> its size line, for sizes in which tokens come."""
_NO_LINE: Final = b"\xff"

IDLE_MAX = 1024
"""Idle connections per instance."""

IDLE_SECONDS = 15.0
"""Idle connections are closed after this: a thousand take about five megabytes, and a new one is cheap."""


_HEADS_MAX = 256
_HEAD_BYTES_MAX = 1024


class Receiver(Protocol):
    """Gets the reply on a connection."""

    def reply_bytes(self, data: bytes) -> None: ...

    def reply_ended(self, error: Exception | None) -> None:
        """The connection is gone: closed by the server, or lost for `error`."""
        ...

    def upstream_full(self) -> None:
        """The server does not take what was written: write no more for now."""
        ...

    def upstream_drained(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to a server. Passes tokens on by itself after `pass_tokens`."""

    __slots__ = ("idle_since", "passed", "passes_tokens", "pool", "receiver", "reused", "send", "transport", "url")

    def __init__(self, pool: Pool, url: str) -> None:
        self.pool = pool
        self.url = url
        self.receiver: Receiver | None = None
        self.reused = False
        """Whether it has carried a request before: its server may already have closed it."""
        self.idle_since = 0.0
        self.passes_tokens = False
        """Whether a piece that is one whole token goes directly to `send`. Set by the receiver."""
        self.passed = 0
        """Bytes passed directly, and in the upper bits the number of chunks: one number, as each token changes it."""
        self.send: Send = discard
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.passes_tokens and data.startswith(_SIZE_LINES.get(len(data), _NO_LINE)) and data.endswith(TOKEN_ENDS):
            # The path of every token: touches little memory and keeps nothing.
            self.passed += ONE_CHUNK + len(data)
            self.send(data)
            return
        receiver = self.receiver
        if receiver is None:
            self.abort()  # nothing was requested
        else:
            receiver.reply_bytes(data)

    def connection_lost(self, exc: Exception | None) -> None:
        receiver, self.receiver = self.receiver, None
        self.pool.lost(self)
        if receiver is not None:
            receiver.reply_ended(exc)

    def pause_writing(self) -> None:
        if self.receiver is not None:
            self.receiver.upstream_full()

    def resume_writing(self) -> None:
        if self.receiver is not None:
            self.receiver.upstream_drained()

    def pass_tokens(self, send: Send) -> None:
        """Passes whole tokens to `send` until `stop_passing`."""
        self.send = send
        self.passes_tokens = True

    def stop_passing(self) -> int:
        """The receiver gets every piece again; returns and resets `passed`."""
        passed, self.passed = self.passed, 0
        self.passes_tokens = False
        self.send = discard
        return passed

    def abort(self) -> None:
        """Closes it at once, which stops the server's work. The receiver is not notified."""
        self.receiver = None
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    authority: bytes
    tls: ssl.SSLContext | None


class Opening:
    """A connection being made. After `cancel` its outcome is ignored."""

    __slots__ = ("cancelled", "failed", "opened")

    def __init__(self, opened: Callable[[UpstreamConnection], None], failed: Callable[[Exception], None]) -> None:
        self.opened = opened
        self.failed = failed
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Pool:
    """Connections by instance. Use within one event loop, and `close` at the end."""

    def __init__(self, connect_timeout_seconds: float, now: Callable[[], float]) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._now = now
        self._idle: dict[str, list[UpstreamConnection]] = {}
        self._addresses: dict[str, _Address] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.heads: dict[bytes, ReplyHead] = {}
        """Parsed reply heads by their bytes: many replies begin alike."""

    @property
    def idle_count(self) -> int:
        return sum(len(connections) for connections in self._idle.values())

    @property
    def opening_count(self) -> int:
        return len(self._tasks)

    def authority(self, url: str) -> bytes:
        """The Host header for requests to `url`."""
        return self._address(url).authority

    def take(self, url: str) -> UpstreamConnection | None:
        """The most recently used idle connection, or None."""
        idle = self._idle.get(url)
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def open(
        self, url: str, opened: Callable[[UpstreamConnection], None], failed: Callable[[Exception], None]
    ) -> Opening:
        """Starts to connect; calls one of the callbacks later, unless cancelled."""
        opening = Opening(opened, failed)
        task = asyncio.get_running_loop().create_task(self._open(url, opening))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return opening

    def release(self, connection: UpstreamConnection) -> None:
        """Returns a connection for the next request. The whole reply must have come and the whole request been sent."""
        connection.receiver = None
        idle = self._idle.setdefault(connection.url, [])
        if self._closed or len(idle) >= IDLE_MAX or connection.transport.is_closing():
            connection.abort()
            return
        connection.reused = True
        connection.idle_since = self._now()
        idle.append(connection)

    def remember(self, raw: bytes, head: ReplyHead) -> None:
        """Caches a reply's head that came in one piece."""
        if len(raw) <= _HEAD_BYTES_MAX:
            if len(self.heads) >= _HEADS_MAX:
                self.heads.clear()
            self.heads[raw] = head

    def lost(self, connection: UpstreamConnection) -> None:
        """Removes a closed connection if it was idle."""
        idle = self._idle.get(connection.url)
        if idle and connection in idle:
            idle.remove(connection)

    def sweep(self, now: float) -> int:
        """Closes connections that have been idle for too long; returns how many."""
        closed = 0
        for idle in self._idle.values():  # the oldest first
            expired = next((n for n, each in enumerate(idle) if now - each.idle_since <= IDLE_SECONDS), len(idle))
            for connection in idle[:expired]:
                connection.abort()
            del idle[:expired]
            closed += expired
        return closed

    async def close(self) -> None:
        self._closed = True
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, url: str, opening: Opening) -> None:
        address = self._address(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self, url), address.host, address.port, ssl=address.tls
                )
        except (OSError, TimeoutError) as error:
            if not opening.cancelled:
                opening.failed(error)
            return
        if not opening.cancelled:
            opening.opened(connection)
        else:
            self.release(connection)
            connection.reused = False

    def _address(self, url: str) -> _Address:
        address = self._addresses.get(url)
        if address is None:
            parts = urlsplit(url)
            secure = parts.scheme == "https"
            address = self._addresses[url] = _Address(
                parts.hostname or "",
                parts.port or (443 if secure else 80),
                parts.netloc.encode(),
                ssl.create_default_context() if secure else None,
            )
        return address
