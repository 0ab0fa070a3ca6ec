"""Connections to the servers behind, kept open between requests: one pool an instance, no limit on those in use.

A limit on connections would queue streams where nobody sees it; slots are what bounds them. An idle connection on which
anything comes, or which its server closes, is dropped at once. Whoever takes a connection gets what comes on it through
`Receiver`, and gives it back only when the last byte of a whole reply has come. Nothing is retried here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

from router.http1.parser import ReplyHead
from router.proxy.interfaces import Send, nowhere

TOKEN_ENDS: Final = (b'"done":false}\n\r\n', b'"finish_reason":null}]}\n\n\r\n', b'"}}\n\n\r\n')
"""How a token ends in each API, and no last line: what is looked for at the end of an answer is not in such a piece."""
ONE_CHUNK: Final = 1 << 40
_SIZE_LINES: Final = {len(b"%x\r\n" % size) + size + 2: b"%x\r\n" % size for size in range(16, 2048)}
"""How long a whole chunk is, and its size line, which no other chunk as long has: for such as tokens come in."""
_NO_LINE: Final = b"\xff"

IDLE_MAX = 1024
"""Idle connections kept for one instance."""

IDLE_SECONDS = 15.0
"""An idle connection is closed after that: a thousand of them hold some five megabytes, and a new one costs little."""


_REMEMBERED_MAX = 256
_REMEMBERED_BYTES_MAX = 1024


class Receiver(Protocol):
    """Whoever asked on a connection."""

    def reply_bytes(self, data: bytes) -> None: ...

    def reply_ended(self, error: Exception | None) -> None:
        """The connection is gone: closed by the server, or lost for `error`."""
        ...

    def upstream_full(self) -> None:
        """What was written stays in this process: write no more for now."""
        ...

    def upstream_drained(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to a server. It passes tokens on by itself where its receiver has said so."""

    __slots__ = ("idle_since", "passed", "pool", "quick", "receiver", "reused", "send", "transport", "url")

    def __init__(self, pool: Pool, url: str) -> None:
        self.pool = pool
        self.url = url
        self.receiver: Receiver | None = None
        self.reused = False
        """Whether it has carried a request before: then its server may have closed it already."""
        self.idle_since = 0.0
        self.quick = False
        """Whether a piece that is one whole token goes to `send` and needs no closer look: the receiver's to say."""
        self.passed = 0
        """Bytes that went so, and in the upper bits how many chunks: one number, because each token changes it."""
        self.send: Send = nowhere
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.quick and data.startswith(_SIZE_LINES.get(len(data), _NO_LINE)) and data.endswith(TOKEN_ENDS):
            # The way of every token. Little is touched, and nothing kept: memory that stays is memory that is cold.
            self.passed += ONE_CHUNK + len(data)
            self.send(data)
            return
        receiver = self.receiver
        if receiver is None:
            self.abort()  # nothing was asked
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
        """From here on, until `taken_back`."""
        self.send = send
        self.quick = True

    def taken_back(self) -> int:
        """Every piece is the receiver's again; returns what was `passed`, which is forgotten here."""
        passed, self.passed = self.passed, 0
        self.quick = False
        self.send = nowhere
        return passed

    def abort(self) -> None:
        """Drops it at once; its server stops what it does for it. Nobody is told."""
        self.receiver = None
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    authority: bytes
    tls: ssl.SSLContext | None


class Opening:
    """A connection that is being made; `cancel` makes its outcome nobody's."""

    __slots__ = ("failed", "opened", "wanted")

    def __init__(self, opened: Callable[[UpstreamConnection], None], failed: Callable[[Exception], None]) -> None:
        self.opened = opened
        self.failed = failed
        self.wanted = True

    def cancel(self) -> None:
        self.wanted = False


class Pool:
    """Connections by instance. To be used within one event loop; `close` ends what is left."""

    def __init__(self, connect_timeout_seconds: float, now: Callable[[], float]) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._now = now
        self._idle: dict[str, list[UpstreamConnection]] = {}
        self._addresses: dict[str, _Address] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.heads: dict[bytes, ReplyHead] = {}
        """Heads of replies that were read before: many replies begin alike."""

    @property
    def idle_count(self) -> int:
        return sum(len(connections) for connections in self._idle.values())

    @property
    def opening_count(self) -> int:
        return len(self._tasks)

    def authority(self, url: str) -> bytes:
        """What the Host header of a request to `url` says."""
        return self._address(url).authority

    def take(self, url: str) -> UpstreamConnection | None:
        """The idle connection that was used last, or None."""
        idle = self._idle.get(url)
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def open(
        self, url: str, opened: Callable[[UpstreamConnection], None], failed: Callable[[Exception], None]
    ) -> Opening:
        """Begins to connect; one of the callbacks is called later, unless the opening is cancelled."""
        opening = Opening(opened, failed)
        task = asyncio.get_running_loop().create_task(self._open(url, opening))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return opening

    def release(self, connection: UpstreamConnection) -> None:
        """For the next request. The whole reply must have come, and the whole request must have gone."""
        connection.receiver = None
        idle = self._idle.setdefault(connection.url, [])
        if self._closed or len(idle) >= IDLE_MAX or connection.transport.is_closing():
            connection.abort()
            return
        connection.reused = True
        connection.idle_since = self._now()
        idle.append(connection)

    def remember(self, raw: bytes, head: ReplyHead) -> None:
        """A reply's head that came whole, to be known again."""
        if len(raw) <= _REMEMBERED_BYTES_MAX:
            if len(self.heads) >= _REMEMBERED_MAX:
                self.heads.clear()
            self.heads[raw] = head

    def lost(self, connection: UpstreamConnection) -> None:
        """A connection is gone; where it was idle it is forgotten."""
        idle = self._idle.get(connection.url)
        if idle and connection in idle:
            idle.remove(connection)

    def sweep(self, now: float) -> int:
        """Closes what has been idle for too long, and says how many: the oldest stand first."""
        closed = 0
        for idle in self._idle.values():
            old = next((n for n, each in enumerate(idle) if now - each.idle_since <= IDLE_SECONDS), len(idle))
            for connection in idle[:old]:
                connection.abort()
            del idle[:old]
            closed += old
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
            if opening.wanted:
                opening.failed(error)
            return
        if opening.wanted:
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
