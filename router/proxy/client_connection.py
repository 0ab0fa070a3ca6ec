"""A client's connection: reads requests one after the other, and passes each to whatever serves it.

Theory of operation
-------------------
The connection is always in one state:

    HEAD      between two requests, or within a head
    BODY      within the body of a request that the proxy serves itself
    BUSY      that request is complete; its `ProxyExchange` works on the response
    BRIDGED   a request of any other kind is with aiohttp (`router/proxy/aiohttp_bridge.py`)
    LINGER    the response was sent before the request was complete; the rest is discarded, then the connection closes

Requests are served one at a time in the order of arrival. At most `AHEAD_BYTES_MAX` of later requests are buffered,
then reading pauses; a hang-up after that shows only when a response cannot be written. Up to then the connection is
always read, so that a hang-up shows at once in every phase of a request. A half-close counts as one: an Ollama server
also treats a client that has closed its sending side as gone, and stops generating.

Reasons to pause reading are listed in `router/proxy/flow_control.py`. Deadlines are not timers: `check` is called
periodically for every connection.

It parses no body, and decides nothing about models, slots or servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, cast

import structlog

from router.domain.access_key import UNLIMITED
from router.errors import QueueFull, RouterError, WaitTimeout
from router.http1.body_framing import FramingError
from router.http1.parser import HeadError, RequestHead
from router.http1.response_writer import CONTINUE, LocalResponse, whole_response
from router.llm_api.errors import CODE_HEADER
from router.observability.request_record import RequestRecord
from router.observability.running_request import RunningRequest
from router.proxy.aiohttp_bridge import AiohttpBridge
from router.proxy.body_deadline import BodyDeadline
from router.proxy.context import ProxyContext
from router.proxy.engine_exchange import EngineExchange, EngineUpload
from router.proxy.exchange import ProxyExchange
from router.proxy.flow_control import FlowControl, Reason
from router.proxy.head_cache import HeadFacts
from router.proxy.interfaces import Listener, Send, discard
from router.proxy.request_body import LONG_BODY_BYTES, RequestBodyReader, is_worth_reading
from router.proxy.streaming_upload import StreamingUpload

AHEAD_BYTES_MAX: Final = 65536
"""Bytes buffered that belong to later requests."""

_UPLOADS: Final = b"/api/blobs/"
"""Bodies of any length, streamed."""

HEAD, BODY, BUSY, BRIDGED, LINGER = range(5)
_NEVER: Final = float("inf")
_TOO_MANY_CONNECTIONS: Final = b"server busy: too many connections (server.max_connections)"


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_after_body", "_ahead", "_body_deadline", "_body_reader", "_bridge", "_context", "_due", "_exchange",
        "_flow", "_half_closed", "_head", "_head_pieces", "_keep", "_last_cached", "_listener", "_peer", "_reading",
        "_state", "_transport", "send", "write_paused",
    )  # fmt: skip

    def __init__(self, context: ProxyContext, listener: Listener) -> None:
        self._context = context
        self._listener = listener
        self._state = HEAD
        self._transport = cast("asyncio.Transport", None)
        self.send: Send = discard
        self._peer = ""
        self._head: RequestHead | None = None
        """The head being parsed, or that of the request being served."""
        self._last_cached: RequestHead | None = None
        """The last head found in the cache: a client's heads are often all the same."""
        self._head_pieces: list[bytes] = []
        """Pieces of a head that did not come at once."""
        self._body_reader: RequestBodyReader | None = None
        self._body_deadline: BodyDeadline | None = None
        """Of a body that is still coming."""
        self._after_body: Callable[[], None] | None = None
        """Responds to a refused request once the rest of it has been read."""
        self._ahead = b""
        self._reading = False
        """Whether `data_received` is reading requests; it is called again from within."""
        self._exchange: ProxyExchange | None = None
        self._bridge: AiohttpBridge | None = None
        self._keep = True
        self._half_closed = False
        self.write_paused = False
        self._flow = cast("FlowControl", None)
        self._due = _NEVER

    # --- from the transport ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.send = self._transport.write
        if transport.get_extra_info("sslcontext") is None:  # bytes leave at once, before the request is recorded
            self._transport.set_write_buffer_limits(0)
        self._flow = FlowControl(self._transport)
        peer: object = transport.get_extra_info("peername")
        self._peer = str(cast("tuple[object, ...]", peer)[0]) if isinstance(peer, tuple) else ""
        self._due = self._context.controller.now() + self._context.limits.connection_timeout_seconds
        self._listener.opened(self)
        if self._listener.is_full:
            headers = (
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Retry-After", "1"),
                (CODE_HEADER, QueueFull.code),
            )
            self.send(whole_response(None, LocalResponse(503, headers, _TOO_MANY_CONNECTIONS), keep=False))
            self._state = LINGER
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        state = self._state
        try:
            if state == HEAD:
                self._ahead = self._ahead + data if self._ahead else data
                if self._reading:
                    return
                self._reading = True
                while self._ahead and self._state == HEAD:
                    if self.write_paused:  # the client does not read earlier responses: no new ones
                        self._flow.set(Reason.RESPONSES_UNREAD, on=True)
                        break
                    piece, self._ahead = self._ahead, b""
                    self._read_head(piece)
                self._reading = False
            elif state == BODY:
                self._read_body(data)
            elif state == BRIDGED:
                self._feed_bridge(data)
            elif state == BUSY:
                self._buffer_ahead(data)
        except Exception:  # the outermost edge of a connection
            self._crashed()

    def eof_received(self) -> bool:
        if self._state == BRIDGED and self._transport.can_write_eof():
            self._half_closed = True
            self._due = self._context.controller.now() + self._context.limits.half_closed_timeout_seconds
            return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.lost(self)
        self.send = discard
        if self._exchange is not None:
            self._exchange.client_gone()
        if self._bridge is not None:
            self._bridge.connection_lost(exc)
        self._exchange = self._bridge = self._body_deadline = None
        self._state, self._due = LINGER, _NEVER

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._exchange is not None:
            self._exchange.pause()
        if self._bridge is not None and self._state == BRIDGED:
            self._bridge.pause_writing()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        if self._bridge is not None:
            self._bridge.resume_writing()
        self._flow.set(Reason.RESPONSES_UNREAD, on=False)
        if self._state == HEAD and self._ahead:
            self.data_received(b"")

    # --- one request after the other -------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        head = self._head
        if head is None:
            if data[0] in b"\r\n":
                data = data.lstrip(b"\r\n")  # RFC 9112, 2.2
                if not data:
                    return
            cached = self._last_cached
            if cached is None or not data.startswith(cached.raw):
                self._last_cached = cached = self._context.heads.find(self._peer, data)
            if cached is not None:
                self._begin(cached, cached.derived, data, len(cached.raw))
                return
            self._head = head = RequestHead()
            self._due = self._context.controller.now() + self._context.limits.head_timeout_seconds
        try:
            end = head.feed(data)
        except HeadError as error:
            self._refuse_head(error)
            return
        if end < 0:
            self._head_pieces.append(data)
            return
        facts = self._context.leased_head(head)
        if facts is None:
            self._hand_over(head, data, end)
            return
        if not self._head_pieces:
            self._context.heads.remember(self._peer, head, data[:end])
        self._begin(head, facts, data, end)

    def _buffer_ahead(self, data: bytes) -> None:
        self._ahead += data
        if len(self._ahead) > AHEAD_BYTES_MAX:
            self._flow.set(Reason.AHEAD, on=True)

    def response_ended(self, *, keep: bool) -> None:
        """The response is out: reads the next request, or closes."""
        if self._state == BODY:  # the request is not complete yet
            self._linger()
            return
        self._exchange = self._head = None
        if not keep or self._half_closed or self._listener.closing:
            self._state = LINGER
            self._transport.close()
            return
        self._state = HEAD
        self._due = self._context.controller.now() + self._context.limits.connection_timeout_seconds
        if self._ahead:
            self._flow.set(Reason.AHEAD, on=False)
            if not self._reading:
                asyncio.get_running_loop().call_soon(self.data_received, b"")

    # --- requests that the proxy serves itself ---------------------------------------------------------------

    def _begin(self, head: RequestHead, facts: HeadFacts, data: bytes, end: int) -> None:
        """The head is complete and ends at `end` in `data`: admits the request and starts its exchange."""
        context, limits, length = self._context, self._context.limits, head.length or 0
        self._head = head
        self._head_pieces = []
        self._keep = head.keep_alive
        self._after_body = None
        rest = data[end:]
        admission = facts.admission
        if admission is None or length > limits.max_body_bytes:
            admission = context.admit(head, facts, self._peer)
        identity = admission.client_identity
        record = RequestRecord(
            facts.request_id or context.new_request_id(),
            identity.client,
            facts.route.path,
            context.controller.now(),
            facts.wants_reason,
            cors_headers=admission.cors_headers,
        )
        error, key = admission.error, identity.key
        if key is not None:
            record.key = key
            if key.limits is not UNLIMITED and admission.is_admitted:
                error = context.charge(record, key)
        self._state, self._due = BODY, _NEVER
        reader = None
        if length < LONG_BODY_BYTES:
            made = ProxyExchange if context.engines is None else EngineExchange
            exchange = made(context, self, head, facts, record, identity)
        else:
            self._listener.long_bodies += 1
            if facts.is_zstd or facts.is_form:  # only the whole body names its model
                made = ProxyExchange if context.engines is None else EngineExchange
                exchange = made(context, self, head, facts, record, identity)
            else:
                reader = RequestBodyReader(head, limits)
                uploads = StreamingUpload if context.engines is None else EngineUpload
                exchange = uploads(context, self, head, facts, record, identity, reader)
        self._exchange = exchange
        if error is not None:
            self._refuse(head, rest, partial(exchange.fail, error))
        elif admission.response is not None:
            if admission.refusal:
                record.refuse(admission.refusal)
            self._refuse(head, rest, partial(exchange.respond, admission.response))
        elif head.chunked or len(rest) < length:
            self._start_body(head, rest, reader or RequestBodyReader(head, limits, skims=False))
        else:
            self._state = BUSY
            self._ahead = rest[length:]
            exchange.begin(rest[:length])

    def _start_body(self, head: RequestHead, rest: bytes, reader: RequestBodyReader) -> None:
        self._body_reader = reader
        self._expect_body(is_bounded=True)
        if head.expects_continue and not rest:
            self.send(CONTINUE)
        if rest:
            self._read_body(rest)

    def _read_body(self, data: bytes) -> None:
        reader, exchange = self._body_reader, self._exchange
        assert reader is not None
        assert exchange is not None
        try:
            ahead = reader.feed(data)
        except FramingError as error:
            self._refuse_head(HeadError(400, f"Bad Request: {error}"))
            return
        except RouterError as error:
            self._keep = False
            exchange.fail(error)
            return
        if ahead is None:
            self._body_received(len(data))
            if self._after_body is None:
                exchange.body_progressed()
            return
        self._ahead = ahead
        self._state = BUSY
        self._due = _NEVER
        self._body_reader = self._body_deadline = None
        if self._after_body is not None:
            self._after_body()
        else:
            exchange.begin(b"" if reader.is_long else reader.body())

    def _expect_body(self, *, is_bounded: bool) -> None:
        self._body_deadline = BodyDeadline(self._context.limits, self._context.controller.now(), is_bounded=is_bounded)
        self._due = self._body_deadline.due

    def _body_received(self, piece_bytes: int) -> None:
        deadline = self._body_deadline
        if deadline is not None:
            deadline.received(piece_bytes, self._context.controller.now())
            self._due = deadline.due

    def _refuse(self, head: RequestHead, rest: bytes, respond: Callable[[], None]) -> None:
        """Responds before the body is complete: a short body is read first, a long one is cut off."""
        if not head.has_body:
            self._state = BUSY
            self._ahead = rest
            respond()
        elif is_worth_reading(head):
            self._after_body = respond
            self._start_body(head, rest, RequestBodyReader(head, self._context.limits, discards=True))
        else:
            self._keep = False
            respond()

    def _refuse_head(self, error: HeadError) -> None:
        """An unparsable request gets no API's error shape, and nothing after it can be trusted."""
        if self._exchange is not None:
            self._exchange.client_gone(error.status)
        headers = (("Content-Type", "text/plain; charset=utf-8"),)
        response = LocalResponse(error.status, headers, f"{error.status} {error.message}".encode())
        self.send(whole_response(None, response, keep=False))
        self._linger()

    def _linger(self) -> None:
        """Closes so that the client sees the response: a close with unread bytes would reset the connection."""
        self._exchange = self._body_deadline = None
        self._state = LINGER
        self._due = self._context.controller.now() + self._context.limits.linger_timeout_seconds
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # --- from the exchange -----------------------------------------------------------------------------------

    def may_keep(self) -> bool:
        return self._keep and not self._listener.closing and self._state != BODY

    def respond(self, response: LocalResponse) -> None:
        keep, is_incomplete = self.may_keep(), self._state == BODY
        self.send(whole_response(self._head, response, keep=keep))
        if is_incomplete:
            self._linger()
        else:
            self.response_ended(keep=keep)

    def body_blocked(self, *, blocked: bool) -> None:
        self._flow.set(Reason.UPSTREAM_FULL, on=blocked)

    def abort(self) -> None:
        self._transport.abort()

    # --- requests for aiohttp --------------------------------------------------------------------------------

    def _hand_over(self, head: RequestHead, data: bytes, end: int) -> None:
        raw_head = head.rewritten() if head.was_absolute else b"".join((*self._head_pieces, data[:end]))
        self._head_pieces = []
        self._keep = head.keep_alive
        self._state, self._due = BRIDGED, _NEVER
        if self._bridge is None:
            self._bridge = AiohttpBridge(self, self._transport, self._context.make_handler())
        if self.write_paused:
            self._bridge.pause_writing()
        self._bridge.begin(head, raw_head)
        if self._bridge.awaits_body:
            self._expect_body(is_bounded=not head.target.startswith(_UPLOADS))
        self._feed_bridge(data[end:])

    def _feed_bridge(self, data: bytes) -> None:
        bridge = self._bridge
        assert bridge is not None
        try:
            ahead = bridge.feed(data)
        except FramingError:
            self._transport.abort()
            return
        if ahead:
            self._buffer_ahead(ahead)
        if bridge.awaits_body:
            self._body_received(len(data))
        else:
            self._body_deadline, self._due = None, _NEVER

    def bridge_done(self, *, keep: bool) -> None:
        if self._state == BRIDGED and not self._transport.is_closing():
            self._flow.set(Reason.AIOHTTP_FULL, on=False)
            self.response_ended(keep=self._keep and keep)

    def bridge_closed(self) -> None:
        self._bridge = None

    def bridge_paused(self, *, paused: bool) -> None:
        self._flow.set(Reason.AIOHTTP_FULL, on=paused)

    # --- deadlines and ends ----------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Checks the deadlines; to be called periodically."""
        if self._exchange is not None:
            self._exchange.check(now)
        deadline = self._body_deadline
        if deadline is not None and self._flow.is_paused:
            deadline.not_read(now)
            self._due = deadline.due
        if self._state == BUSY or now < self._due or self._transport.is_closing():
            return
        if self._state == BODY:
            self._keep = False
            assert self._exchange is not None
            self._exchange.fail(WaitTimeout("the request's body stopped coming or is too slow", status=408))
        elif self._state == HEAD and self._head is not None:
            self._refuse_head(HeadError(408, "Request Timeout"))
        elif self._state == BRIDGED:
            self._transport.abort()
        else:
            self._transport.close()

    def running(self) -> RunningRequest | None:
        """Its request that is with a server now."""
        return None if self._exchange is None else self._exchange.running()

    def forget_head(self) -> None:
        """The next request is admitted anew, even if its head is that of an earlier one."""
        self._last_cached = None

    @property
    def is_new(self) -> bool:
        """Whether it has sent nothing yet; also said of a few that have."""
        return self._state == HEAD and self._head is None and self._last_cached is None

    def drain(self) -> None:
        """Closes the connection if it has no request."""
        if self._state == HEAD and self._head is None:
            self._transport.close()

    def cut(self, error: RouterError) -> None:
        """Ends the current request, if it takes a slot, with an error."""
        if self._exchange is not None:
            self._exchange.cut(error)

    def _crashed(self) -> None:
        structlog.get_logger("router.proxy").exception("connection_crashed", client=self._peer)
        self._transport.abort()
