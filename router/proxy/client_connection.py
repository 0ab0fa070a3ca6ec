"""A client's connection: reads requests one after the other, and gives each to whoever answers it.

Theory of operation
-------------------
The connection is at any time in one place:

    HEAD      between two requests, or inside a head
    BODY      inside the body of a request that the relay answers itself
    BUSY      that request is whole; its `ProxyExchange` works on the answer
    HANDED    a request of any other kind is with the HTTP library (`router/proxy/aiohttp_bridge.py`)
    LINGER    the answer was sent before the request had come whole; what comes is thrown away, then it is closed

Requests are answered one at a time in the order they came. What a client sends ahead is kept, at most `AHEAD_BYTES_MAX`
of it, then nothing more is read: a hang-up behind it shows when an answer cannot be written. Up to that the connection
is always read, so that a hang-up shows at once wherever the request stands. Half a close counts as one: an Ollama
server itself takes a client that says it will send no more for gone, and ends its generation.

Why reading pauses stands in `router/proxy/flow_control.py`. Deadlines are not timers: `check` is called for every
connection now and then with the time.

It parses no body, and decides nothing about models, slots or servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, cast

import structlog

from router.admission.origin_check import Answer
from router.errors import RouterError, WaitTimeout
from router.http1.body_framing import FramingError
from router.http1.parser import HeadError, RequestHead
from router.http1.response_writer import CONTINUE, whole_answer
from router.proxy.aiohttp_bridge import AiohttpBridge
from router.proxy.context import HeadInfo, Listener, ProxyContext
from router.proxy.exchange import ProxyExchange
from router.proxy.flow_control import FlowControl, Reason
from router.proxy.interfaces import Send, nowhere
from router.proxy.request_body import LONG_BYTES, UNREAD_BYTES_MAX, RequestBodyReader, is_worth_reading
from router.proxy.streaming_upload import StreamingUpload

AHEAD_BYTES_MAX: Final = 65536
"""So much that belongs to later requests is kept."""

HEAD, BODY, BUSY, HANDED, LINGER = range(5)
_NEVER: Final = float("inf")


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_ahead", "_context", "_due", "_exchange", "_half_closed", "_handed", "_head", "_intake", "_keep", "_known",
        "_listener", "_pauses", "_peer", "_raw", "_running", "_state", "_then", "_transport", "send",
        "write_paused",
    )  # fmt: skip

    def __init__(self, context: ProxyContext, listener: Listener) -> None:
        self._context = context
        self._listener = listener
        self._state = HEAD
        self._transport = cast("asyncio.Transport", None)
        self.send: Send = nowhere
        self._peer = ""
        self._head: RequestHead | None = None
        """The one being read, or that of the request being answered."""
        self._known: RequestHead | None = None
        """The last that was known already: a client's heads are often all the same."""
        self._raw: list[bytes] = []  # the pieces of a head that did not come whole
        self._intake: RequestBodyReader | None = None
        self._then: Callable[[], None] | None = None
        """What answers a refused request once the rest of it has been read."""
        self._ahead = b""
        self._running = False
        self._exchange: ProxyExchange | None = None
        self._handed: AiohttpBridge | None = None
        self._keep = True
        self._half_closed = False
        self.write_paused = False
        self._pauses = cast("FlowControl", None)
        self._due = _NEVER

    # --- the transport's calls -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.send = self._transport.write
        if transport.get_extra_info("sslcontext") is None:  # bytes leave at once, not when the books are closed as well
            self._transport.set_write_buffer_limits(0)
        self._pauses = FlowControl(self._transport)
        peer: object = transport.get_extra_info("peername")
        self._peer = str(cast("tuple[object, ...]", peer)[0]) if isinstance(peer, tuple) else ""
        self._due = self._context.controller.now() + self._context.timeouts.idle_seconds
        self._listener.opened(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        try:
            if state == HEAD:
                self._run(self._ahead + data if self._ahead else data)
            elif state == BODY:
                self._read_body(data)
            elif state == HANDED:
                self._lend(data)
            elif state == BUSY:
                self._keep_ahead(data)
        except Exception:  # the outermost edge of a connection
            self._crashed()

    def eof_received(self) -> bool:
        if self._state == HANDED and self._transport.can_write_eof():
            self._half_closed = True
            self._due = self._context.controller.now() + self._context.timeouts.half_closed_seconds
            return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.lost(self)
        self.send = nowhere
        if self._exchange is not None:
            self._exchange.client_gone()
        if self._handed is not None:
            self._handed.lost(exc)
        self._exchange = self._handed = None
        self._state, self._due = LINGER, _NEVER

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._exchange is not None:
            self._exchange.pause()
        if self._handed is not None and self._state == HANDED:
            self._handed.pause_writing()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        if self._handed is not None:
            self._handed.resume_writing()
        self._pauses.set(Reason.UNTAKEN, on=False)
        if self._state == HEAD and self._ahead:
            self.data_received(b"")

    # --- requests one after the other ------------------------------------------------------------------------

    def _run(self, data: bytes) -> None:
        """Reads requests out of `data` until one of them is being answered, or the bytes end."""
        self._ahead = data
        if self._running:
            return
        self._running = True
        try:
            while self._ahead and self._state == HEAD:
                if self.write_paused:  # earlier answers are not taken: no new ones
                    self._pauses.set(Reason.UNTAKEN, on=True)
                    return
                piece, self._ahead = self._ahead, b""
                self._read_head(piece)
        finally:
            self._running = False

    def _read_head(self, data: bytes) -> None:
        head = self._head
        if head is None:
            if data[0] in b"\r\n":
                data = data.lstrip(b"\r\n")  # RFC 9112, 2.2
                if not data:
                    return
            known = self._known
            if known is None or not data.startswith(known.raw):
                self._known = known = self._context.heads.find(self._peer, data)
            if known is not None:
                self._begin(known, data, len(known.raw), known.notes)
                return
            self._head = head = RequestHead()
            self._due = self._context.controller.now() + self._context.timeouts.head_seconds
        try:
            end = head.feed(data)
        except HeadError as error:
            self._refuse_head(error)
            return
        if end < 0:
            self._raw.append(data)
            return
        notes = self._context.leased_route(head)
        if not self._raw and notes is not None:
            self._context.heads.remember(self._peer, head, data[:end])
        self._begin(head, data, end, notes)

    def _begin(self, head: RequestHead, data: bytes, end: int, notes: HeadInfo | None) -> None:
        """The head is whole and ends there in `data`."""
        self._head = head
        self._due = _NEVER
        self._keep = head.keep_alive
        rest = data[end:] if end < len(data) else b""
        raw, self._raw = self._raw, []
        if notes is None:
            self._hand_over(head, b"".join((*raw, data[:end])), rest)
        else:
            self._take(head, notes, rest)

    def _keep_ahead(self, data: bytes) -> None:
        self._ahead += data
        if len(self._ahead) > AHEAD_BYTES_MAX:
            self._pauses.set(Reason.AHEAD, on=True)

    def answered(self, *, keep: bool) -> None:
        """The answer is out: the next request, or the end."""
        if self._state == BODY:  # it came before the request had
            self._linger()
            return
        self._exchange = self._head = None
        if not keep or self._half_closed or self._listener.closing:
            self._state = LINGER
            self._transport.close()
            return
        self._state = HEAD
        self._due = self._context.controller.now() + self._context.timeouts.idle_seconds
        if self._ahead:
            self._pauses.set(Reason.AHEAD, on=False)
            if not self._running:
                asyncio.get_running_loop().call_soon(self.data_received, b"")

    # --- requests of our own ---------------------------------------------------------------------------------

    def _take(self, head: RequestHead, notes: HeadInfo, rest: bytes) -> None:
        context, path = self._context, notes.path
        info = context.info(notes, self._peer)
        self._state, self._then, intake = BODY, None, None
        length = head.length or 0
        if length < LONG_BYTES:
            exchange = ProxyExchange(context, self, head, path, info)
        else:
            intake = RequestBodyReader(head, context.limits.max_body_bytes)
            exchange = StreamingUpload(context, self, head, path, info, intake)
            self._listener.long_bodies += 1
        self._exchange = exchange
        try:
            is_good = notes.is_good and length <= context.limits.max_body_bytes
            answer = None if is_good else context.judge(head, notes, info)
        except RouterError as error:
            self._refuse(head, rest, partial(exchange.fail, error))
            return
        if answer is not None:
            self._refuse(head, rest, partial(exchange.answer, answer))
        elif head.chunked or len(rest) < length:
            self._take_in(head, rest, intake or RequestBodyReader(head, context.limits.max_body_bytes))
        else:
            self._state = BUSY
            self._ahead = rest[length:]
            exchange.begin(rest[:length])

    def _take_in(self, head: RequestHead, rest: bytes, intake: RequestBodyReader) -> None:
        self._intake = intake
        self._due = self._context.controller.now() + self._context.timeouts.body_seconds
        if head.awaits_word and not rest:
            self.send(CONTINUE)
        if rest:
            self._read_body(rest)

    def _read_body(self, data: bytes) -> None:
        intake, exchange = self._intake, self._exchange
        assert intake is not None
        assert exchange is not None
        try:
            ahead = intake.feed(data)
        except FramingError as error:
            self._refuse_head(HeadError(400, f"Bad Request: {error}"))
            return
        except RouterError as error:
            self._keep = False
            exchange.fail(error)
            return
        if ahead is None:
            self._due = self._context.controller.now() + self._context.timeouts.body_seconds
            if self._then is None:
                exchange.more()
            return
        self._ahead = ahead
        self._state = BUSY
        self._due = _NEVER
        self._intake = None
        if self._then is not None:
            self._then()
        else:
            exchange.begin(b"" if intake.is_long else intake.joined())

    def _refuse(self, head: RequestHead, rest: bytes, then: Callable[[], None]) -> None:
        """The answer is known before the body has come: a short one is read first, a long one is cut off."""
        if not head.has_body:
            self._state = BUSY
            self._ahead = rest
            then()
        elif is_worth_reading(head):
            self._then = then
            self._take_in(head, rest, RequestBodyReader(head, UNREAD_BYTES_MAX, throw_away=True))
        else:
            self._keep = False
            then()

    def _refuse_head(self, error: HeadError) -> None:
        """What cannot be parsed cannot be answered in the form of an API, and nothing after it can be trusted."""
        if self._exchange is not None:
            self._exchange.client_gone()
        text = f"{error.status} {error.words}".encode()
        self.send(whole_answer(None, error.status, (("Content-Type", "text/plain; charset=utf-8"),), text, keep=False))
        self._linger()

    def _linger(self) -> None:
        """Closes so that the answer is seen: a close with unread bytes would reset it away."""
        self._exchange = None
        self._state = LINGER
        self._due = self._context.controller.now() + self._context.timeouts.linger_seconds
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # --- the exchange's calls --------------------------------------------------------------------------------

    def may_keep(self) -> bool:
        return self._keep and not self._listener.closing and self._state != BODY

    def answer(self, answer: Answer) -> None:
        keep, unread = self.may_keep(), self._state == BODY
        self.send(whole_answer(self._head, answer.status, answer.headers, answer.body, keep=keep))
        if unread:
            self._linger()
        else:
            self.answered(keep=keep)

    def body_blocked(self, *, blocked: bool) -> None:
        self._pauses.set(Reason.BLOCKED, on=blocked)

    def abort(self) -> None:
        self._transport.abort()

    # --- requests for the HTTP library -----------------------------------------------------------------------

    def _hand_over(self, head: RequestHead, raw: bytes, rest: bytes) -> None:
        if self._handed is None:
            self._handed = AiohttpBridge(self, self._transport, self._context.make_handler())
        self._state = HANDED
        if self.write_paused:
            self._handed.pause_writing()
        self._handed.begin(head, raw)
        self._lend(rest)

    def _lend(self, data: bytes) -> None:
        handed = self._handed
        assert handed is not None
        try:
            ahead = handed.lend(data)
        except FramingError:
            self._transport.abort()
            return
        if ahead:
            self._keep_ahead(ahead)
        self._due = (
            self._context.controller.now() + self._context.timeouts.body_seconds if handed.wants_body else _NEVER
        )

    def handed_back(self, *, keep: bool) -> None:
        if self._state == HANDED and not self._transport.is_closing():
            self._pauses.set(Reason.LIBRARY, on=False)
            self.answered(keep=self._keep and keep)

    def library_left(self) -> None:
        self._handed = None

    def library_pauses(self, *, paused: bool) -> None:
        self._pauses.set(Reason.LIBRARY, on=paused)

    # --- time, pauses, ends ----------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Looks at the deadlines; to be called now and then."""
        if self._exchange is not None:
            self._exchange.check(now)
        if self._state == BUSY or now < self._due or self._transport.is_closing():
            return
        if self._state == BODY:
            self._keep = False
            assert self._exchange is not None
            self._exchange.fail(WaitTimeout("the request's body stopped coming", status=408))
        elif self._state == HEAD and self._head is not None:
            self._refuse_head(HeadError(408, "Request Timeout"))
        elif self._state == HANDED:
            self._transport.abort()
        else:
            self._transport.close()

    def drain(self) -> None:
        """No new request: a connection that has none is closed."""
        if self._state == HEAD and self._head is None:
            self._transport.close()

    def _crashed(self) -> None:
        structlog.get_logger("router.proxy").exception("connection_crashed", client=self._peer)
        self._transport.abort()
