"""Lets aiohttp serve requests of other kinds on the proxy's own connection.

aiohttp's protocol gets a transport in front of the real one. Through it the bytes of its responses are scanned, so that
the end of each is found by its framing on the wire, not by anything inside aiohttp. Then the connection belongs to the
proxy again. aiohttp gets one request at a time, whose head the proxy has parsed: the two parsers can only differ in
what the stricter one rejects.

A response that switches protocols, or that only a close ends, leaves the connection to aiohttp permanently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any, Final, Protocol

from router.http1.body_framing import MORE, Body, FramingError, NoBody
from router.http1.parser import HeadError, ReplyHead, RequestHead

_NO_BODY: Final = NoBody()


class Host(Protocol):
    """The client's connection."""

    def bridge_done(self, *, keep: bool) -> None:
        """Request and response are complete. `keep`: the response lets the connection stay open."""
        ...

    def bridge_paused(self, *, paused: bool) -> None:
        """aiohttp stops, or resumes, taking the request."""
        ...

    def bridge_closed(self) -> None:
        """aiohttp closed its protocol between requests: the connection continues without it."""
        ...


class AiohttpBridge:
    """aiohttp's protocol for one connection, kept for all requests handed over on it."""

    def __init__(self, host: Host, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        self._host = host
        self._transport = transport
        self._protocol = protocol
        self._transport_for_aiohttp = _BridgeTransport(transport, self)
        self._request: Body = _NO_BODY
        self._request_ended = True
        self._without_body = False
        self._reply = ReplyHead()
        self._reply_body: Body | None = None
        self._reply_ended = True
        self.is_permanent = False
        """Whether the connection stays with aiohttp."""
        self._write_paused = False
        self._protocol.connection_made(self._transport_for_aiohttp)

    @property
    def awaits_body(self) -> bool:
        """Whether the request is incomplete."""
        return not (self._request_ended or self.is_permanent)

    # --- from the connection ---------------------------------------------------------------------------------

    def begin(self, head: RequestHead, raw_head: bytes) -> None:
        """Starts the next request; its body follows through `feed`."""
        self._request = head.body()
        self._request_ended = self._request.feed(b"") != MORE
        self._without_body = head.method == b"HEAD"
        self._reply = ReplyHead()
        self._reply_body = None
        self._reply_ended = False
        self.is_permanent = head.upgrade
        self._protocol.data_received(raw_head)

    def feed(self, data: bytes) -> bytes:
        """Takes bytes after the head; returns those after this request.

        Raises:
            FramingError: the request's body is malformed.
        """
        if self.is_permanent:
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

    def connection_lost(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)

    # --- from aiohttp ----------------------------------------------------------------------------------------

    def written(self, data: bytes) -> None:
        """Scans for the end of the response in what aiohttp writes."""
        if self.is_permanent or self._reply_ended:
            return
        try:
            position = 0 if self._reply_body is not None else self._read_heads(data)
            if position < 0 or self._reply_body is None or self.is_permanent:
                return
            if self._reply_body.feed(data, position) != MORE:
                self._reply_ended = True
                self._maybe_done()
        except (HeadError, FramingError):
            self.is_permanent = True  # without the end of the response the connection cannot be taken back

    def _read_heads(self, data: bytes) -> int:
        """The index after the final head; -1 until that has come."""
        position = 0
        while True:
            position = self._reply.feed(data, position)
            if position < 0:
                return position
            if self._reply.status == 101:
                self.is_permanent = True
                return position
            if self._reply.status >= 200:
                self._reply_body = self._reply.body(without=self._without_body)
                return position
            self._reply = ReplyHead()
            if position == len(data):
                return -1

    def closed(self) -> None:
        """aiohttp closes: within a request the connection, otherwise only its own protocol."""
        if self._request_ended and self._reply_ended and not self.is_permanent:
            self._host.bridge_closed()
            asyncio.get_running_loop().call_soon(self.connection_lost, None)
        else:
            self._transport.close()

    def set_paused(self, *, paused: bool) -> None:
        self._host.bridge_paused(paused=paused)

    def _maybe_done(self) -> None:
        if self._request_ended and self._reply_ended and not self._transport.is_closing():
            # Not at once: aiohttp is in the middle of its write.
            asyncio.get_running_loop().call_soon(partial(self._host.bridge_done, keep=self._reply.keep_alive))


class _BridgeTransport(asyncio.Transport):
    """The real transport as aiohttp sees it."""

    def __init__(self, real: asyncio.Transport, bridge: AiohttpBridge) -> None:
        super().__init__()
        self._real = real
        self._bridge = bridge
        self._protocol: asyncio.BaseProtocol | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._real.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._real.is_closing()

    def close(self) -> None:
        self._bridge.closed()

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
        self._bridge.set_paused(paused=True)

    def resume_reading(self) -> None:
        self._bridge.set_paused(paused=False)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._real.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._real.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._real.get_write_buffer_limits()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._real.write(data)
        self._bridge.written(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self._real.write_eof()

    def can_write_eof(self) -> bool:
        return self._real.can_write_eof()
