"""Requests that are not the relay's, answered by the HTTP library on the same connection.

The library's own protocol for one connection gets a transport that stands before the real one. Through it the bytes
of its answers are watched, so that the end of each is known by the framing on the wire, not by anything inside the
library; then the connection is the relay's again. The library gets one request at a time, parsed and judged before:
what the two parsers think of a head can differ only in what the stricter one refuses.

An answer that switches protocols, or whose end only a close shows, keeps the connection for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any, Final, Protocol

from router.http1.body_framing import MORE, Body, FramingError, NoBody
from router.http1.parser import HeadError, ReplyHead, RequestHead

_NOTHING: Final = NoBody()


class Host(Protocol):
    """The connection that is lent."""

    def handed_back(self, *, keep: bool) -> None:
        """The answer is out and its request has come whole. `keep`: the answer lets the connection go on."""
        ...

    def library_pauses(self, *, paused: bool) -> None:
        """The library wants no more bytes of the request for now, or again."""
        ...

    def library_left(self) -> None:
        """The library is done with the connection while it has no request of it: the connection goes on without."""
        ...


class AiohttpBridge:
    """One connection's side of the library, kept for all requests that are handed over on it."""

    def __init__(self, host: Host, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self._host = host
        self._transport = transport
        self._protocol = protocol
        self._front = _Front(transport, self)
        self._request: Body = _NOTHING
        self._request_ended = True
        self._without_body = False
        self._reply = ReplyHead()
        self._reply_body: Body | None = None
        self._reply_ended = True
        self.answering = False
        """Whether a byte of the present answer is out."""
        self.kept = False
        """Whether the connection stays with the library for good."""
        self._write_paused = False
        self._protocol.connection_made(self._front)

    @property
    def wants_body(self) -> bool:
        """Whether the request has not come whole yet."""
        return not (self._request_ended or self.kept)

    # --- from the connection ---------------------------------------------------------------------------------

    def begin(self, head: RequestHead, raw_head: bytes) -> None:
        """The next request; its body follows through `lend`."""
        self._request = head.body()
        self._request_ended = self._request.feed(b"") != MORE
        self._without_body = head.method == b"HEAD"
        self._reply = ReplyHead()
        self._reply_body = None
        self._reply_ended = False
        self.answering = False
        self.kept = head.upgrade
        self._protocol.data_received(raw_head)

    def lend(self, data: bytes) -> bytes:
        """Bytes after the head; gives back what is not this request's any more.

        Raises:
            FramingError: the request's body is malformed.
        """
        if self.kept:
            self._protocol.data_received(data)
            return b""
        if self._request_ended or not data:
            return data
        end = self._request.feed(data)
        piece = data if end == MORE else data[:end]
        if piece:
            self._protocol.data_received(piece)
        if end == MORE:
            return b""
        self._request_ended = True
        self._maybe_done()
        return data[end:]

    def pause_writing(self) -> None:
        if not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._write_paused:
            self._write_paused = False
            self._protocol.resume_writing()

    def lost(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)

    # --- from the library ------------------------------------------------------------------------------------

    def written(self, data: bytes) -> None:
        """Looks where the answer ends in what the library writes."""
        if self.kept or self._reply_ended:
            return
        self.answering = True
        try:
            position = 0 if self._reply_body is not None else self._read_heads(data)
            if position < 0 or self._reply_body is None or self.kept:
                return
            if self._reply_body.feed(data, position) != MORE:
                self._reply_ended = True
                self._maybe_done()
        except (HeadError, FramingError):
            self.kept = True  # what cannot be followed cannot be taken back

    def _read_heads(self, data: bytes) -> int:
        """The index after the final head; -1 while that has not come."""
        position = 0
        while True:
            position = self._reply.feed(data, position)
            if position < 0:
                return position
            if self._reply.status == 101:
                self.kept = True
                return position
            if self._reply.status >= 200:
                self._reply_body = self._reply.body(without=self._without_body)
                return position
            self._reply = ReplyHead()
            if position == len(data):
                return -1

    def closed(self) -> None:
        """The library closes: for good within a request, else only its own part in the connection."""
        if self._request_ended and self._reply_ended and not self.kept:
            self._host.library_left()
            asyncio.get_running_loop().call_soon(self.lost, None)
        else:
            self._transport.close()

    def pauses(self, *, paused: bool) -> None:
        self._host.library_pauses(paused=paused)

    def _maybe_done(self) -> None:
        if self._request_ended and self._reply_ended and not self._transport.is_closing():
            # Not at once: the library is in the middle of its write.
            asyncio.get_running_loop().call_soon(partial(self._host.handed_back, keep=self._reply.keep_alive))


class _Front(asyncio.Transport):
    """The real transport as the library sees it."""

    def __init__(self, real: asyncio.Transport, state_poller: AiohttpBridge) -> None:
        super().__init__()
        self._real = real
        self._watcher = state_poller
        self._protocol: asyncio.BaseProtocol | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._real.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._real.is_closing()

    def close(self) -> None:
        self._watcher.closed()

    def abort(self) -> None:
        self._real.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def is_reading(self) -> bool:
        return self._real.is_reading()

    def pause_reading(self) -> None:
        self._watcher.pauses(paused=True)

    def resume_reading(self) -> None:
        self._watcher.pauses(paused=False)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._real.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._real.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._real.get_write_buffer_limits()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._real.write(data)
        self._watcher.written(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self._real.write_eof()

    def can_write_eof(self) -> bool:
        return self._real.can_write_eof()
