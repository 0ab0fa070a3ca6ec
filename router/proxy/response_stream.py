"""One reply on its way from a server's connection to the client: its head is read, its bytes go on as they came.

Nothing of the body is parsed but where it ends. A client of HTTP/1.0 knows no chunks and gets the data without them.
After the first byte every failure ends the answer visibly: with an error in the protocol's own form where the framing
allows one, else by a connection that is cut. Whether a reply that failed before that is asked for again is the asker's
business.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from router.api.context import Limits
from router.errors import InstanceLost, RouterError, WaitTimeout
from router.http1.body_framing import MORE, Body, Chunked, FramingError, NoBody, UntilClose
from router.http1.headers import header, reply_headers
from router.http1.parser import HeadError, ReplyHead, RequestHead
from router.http1.response_writer import LAST_CHUNK, chunk, interim_head, reply_head
from router.llm_api.errors import NDJSON, SSE, api_of, stream_error
from router.llm_api.heartbeat_format import refusal
from router.llm_api.stream_end import RUNNER_DIED, TAIL_BYTES, runner_died
from router.proxy.interfaces import Client, ClientIdentity
from router.proxy.upstream_pool import ONE_CHUNK, TOKEN_ENDS, UpstreamConnection

HELD_BYTES_MAX: Final = 65536
HELD_SECONDS: Final = 10.0
"""So much of a reply with status 500, and for so long, is read before it is passed on: it may tell of a dead runner."""

_AWAITED, _HELD, _RELAYED, _OVER = range(4)
_CHUNK_HEADER = re.compile(rb"\r\n[0-9A-Fa-f]{1,15}\r\n")
_NOTHING: Final = NoBody()
_UNREAD: Final = ReplyHead()


class ResponseStream:
    """The receiver on `connection` for one request."""

    request_sent = True
    """False while pieces of the body are still to be written."""
    last = False
    """Whether this is the last attempt: then even a reply that tells of a dead runner is passed on."""
    touched = False
    """Whether any byte of the reply has come."""
    begun = False
    """Whether an answer's head with status 200 is out already, and the client gets chunks (HTTP/1.0: bytes)."""
    _passed = 0
    """What the connection has passed on by itself, as it counts it, without what it has passed since."""
    _bytes = 0
    """Bytes that went otherwise."""
    _tail = b""
    """The end of what has come, since the last piece that ended as a token does."""
    first_byte_at: float | None = None
    last_byte_at: float | None = None
    _phase = _AWAITED
    _body: Body = _NOTHING
    _payload: list[bytes] | None = None
    """Where it is a list, the body's data is collected in it without the server's chunks."""
    _wraps = False
    """Whether the client gets chunks of our own making."""
    _keep = False
    _seen_bytes = -1
    _reply = _UNREAD

    def __init__(
        self,
        client_identity: ClientIdentity,
        client: Client,
        request: RequestHead,
        path: str,
        connection: UpstreamConnection,
        limits: Limits,
        now: Callable[[], float],
    ) -> None:
        self._client_identity = client_identity
        self._client = client
        self._request = request
        self._path = path
        self._limits = limits
        self._now = now
        self._held: list[bytes] = []
        self._due = now() + limits.first_byte_timeout_seconds
        self.connection = connection
        connection.receiver = self

    @property
    def status(self) -> int:
        return self._reply.status

    @property
    def chunks(self) -> int:
        return self._body.chunks + self._passed_by_itself() // ONE_CHUNK

    @property
    def bytes_out(self) -> int:
        return self._bytes + self._passed_by_itself() % ONE_CHUNK

    def _passed_by_itself(self) -> int:
        connection = self.connection
        return self._passed + connection.passed if connection.receiver is self else self._passed

    def tail(self) -> bytes:
        """The end of the reply's data, without its framing."""
        tail = self._tail
        if self._reply.chunked:
            tail = _CHUNK_HEADER.sub(b"", b"\r\n" + tail).removesuffix(b"\r\n")
        return tail

    # --- what comes from the server --------------------------------------------------------------------------

    def reply_bytes(self, data: bytes) -> None:
        if self._phase == _RELAYED:
            self._proxy(data)
        elif self._phase == _AWAITED:
            self._read_head(data)
        elif self._phase == _HELD:
            self._hold(data)

    def reply_ended(self, error: Exception | None) -> None:
        if self._phase == _AWAITED:
            words = "ended the connection before its answer" if error is None else f"was lost: {error}"
            stale = self.connection.reused and not self.touched
            self._over()
            self._client_identity.reply_lost(InstanceLost(f"the instance {words}"), stale=stale)
        elif self._phase == _HELD and error is None and self._body.closed():
            self._judge_held(MORE, 0)
            if self._phase == _RELAYED:
                self._complete(reusable=False)
        elif self._phase == _HELD:
            self._over()
            self._client_identity.reply_lost(InstanceLost("the instance died while it answered"), stale=False)
        elif self._phase == _RELAYED:
            if error is None and self._body.closed():
                self._complete(reusable=False)
            else:
                self._break(InstanceLost("the instance died while it answered"))

    def upstream_full(self) -> None:
        self._client_identity.request_blocked(blocked=True)

    def upstream_drained(self) -> None:
        self._client_identity.request_blocked(blocked=False)

    def sent(self) -> None:
        """The last of the request is written: from here on the first byte is waited for."""
        self.request_sent = True
        if self._phase == _AWAITED:
            self._due = self._now() + self._limits.first_byte_timeout_seconds

    @property
    def has_begun(self) -> bool:
        """Whether bytes of the reply are out."""
        return self._phase >= _RELAYED

    def _read_head(self, data: bytes) -> None:
        start = 0
        if not self.touched:
            self.touched = True
            start = data.find(b"\r\n\r\n") + 4
            known = self.connection.pool.heads.get(data[:start]) if start > 3 else None
            if known is not None:
                self._reply = known
                self._headed(data, start)
                return
            start = 0
            self._reply = ReplyHead()
        while True:
            begun = self._reply.is_begun
            try:
                end = self._reply.feed(data, start)
            except HeadError as error:
                self._malformed(error.words)
                return
            if end < 0:
                return
            if self._reply.status >= 200:
                break
            if self._reply.status == 101:
                self._malformed("it switches protocols unasked")
                return
            if self._reply.status != 100 and self._request.minor:
                self._client.send(interim_head(self._reply, reply_headers(self._reply.headers)))
            self._reply = ReplyHead()
            start = end
        if not begun:
            self.connection.pool.remember(data[start:end], self._reply)
        self._headed(data, end)

    def _headed(self, data: bytes, end: int) -> None:
        """The head is read, and ends there in `data`."""
        reply = self._reply
        refused = self.begun and reply.status != 200
        self._payload = [] if reply.chunked and (refused or not self._request.minor) else None
        self._body = reply.body(payload=self._payload)
        rest = data[end:] if end < len(data) else b""
        if refused or reply.status == 500:
            self._phase = _HELD
            self._due = self._now() + HELD_SECONDS
            self._hold(rest)
        else:
            self._begin(rest)

    def _malformed(self, words: str) -> None:
        self._drop()
        self._client_identity.reply_failed(InstanceLost(f"the instance's answer cannot be read: {words}"))

    def _hold(self, data: bytes) -> None:
        """Keeps a reply that may tell of a dead runner until it is clear whether it does."""
        try:
            end = self._body.feed(data)
        except FramingError as error:
            self._malformed(str(error))
            return
        self._held.append(data)
        if end != MORE or sum(map(len, self._held)) > HELD_BYTES_MAX:
            self._judge_held(end, len(data))

    def _judge_held(self, end: int, last_bytes: int) -> None:
        held = b"".join(self._held)
        self._held = []
        if not self.last and any(words in held for words in RUNNER_DIED):
            self._drop()
            self._client_identity.reply_lost(InstanceLost(held.decode(errors="replace")), stale=False)
            return
        extra = 0 if end == MORE else last_bytes - end
        if self.begun and self._reply.status != 200:
            body = held if self._payload is None else b"".join(self._payload)
            self._drop()
            self._client_identity.reply_failed(refusal(self._reply.status, body))
            return
        self._open(held[: len(held) - extra])
        if end != MORE:
            self._complete(reusable=not extra)

    # --- what goes to the client -----------------------------------------------------------------------------

    def _begin(self, rest: bytes) -> None:
        try:
            end = self._body.feed(rest)
        except FramingError as error:
            self._malformed(str(error))
            return
        self._open(rest if end == MORE else rest[:end])
        if end != MORE:
            self._complete(reusable=end == len(rest))

    def _open(self, piece: bytes) -> None:
        """Sends the answer's head with what there is of its body: from here on bytes are out."""
        self._phase = _RELAYED
        self._due = self._now() + self._limits.idle_timeout_seconds
        own_headers = self._client_identity.own_headers()
        self._client_identity.reply_begins()
        if self._client.write_paused:
            self.pause()
        reply, request = self._reply, self._request
        self._wraps = self.begun and bool(request.minor) and not reply.chunked
        framed = self._wraps or (self._payload is None and not isinstance(self._body, UntilClose))
        self._keep = framed and self._client.may_keep() and (not self.begun or bool(request.minor))
        head = b""
        if not self.begun:
            head = reply_head(reply, own_headers, request, keep=self._keep)
        if piece:
            self._note(piece)
        self._client.send(head + self._for_client(piece))

    def _proxy(self, data: bytes) -> None:
        self._passed += self.connection.taken_back()
        try:
            end = self._body.feed(data)
        except FramingError:
            self._cut_malformed()
            return
        self._pass(data if end == MORE else data[:end])
        if end != MORE:
            self._complete(reusable=end == len(data))
        elif data.endswith(TOKEN_ENDS) and self._payload is None and not self._wraps:
            self._tail = b""
            if isinstance(self._body, Chunked) and self._body.at_boundary:
                self.connection.pass_tokens(self._client.send)

    def _cut_malformed(self) -> None:
        self._drop()
        self._client.abort()
        self._client_identity.reply_broken(InstanceLost("the instance sent a malformed answer"), keep=False, died=False)

    def _pass(self, piece: bytes) -> None:
        self._note(piece)
        if self._payload is not None or self._wraps:
            piece = self._for_client(piece)
        if piece:
            self._client.send(piece)

    def _for_client(self, piece: bytes) -> bytes:
        payload = self._payload
        if payload is not None:
            piece = b"".join(payload)
            payload.clear()
        return chunk(piece) if self._wraps and piece else piece

    def _note(self, piece: bytes) -> None:
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self._bytes += len(piece)
        self._tail = piece[-TAIL_BYTES:] if len(piece) >= TAIL_BYTES else (self._tail + piece)[-TAIL_BYTES:]

    # --- how it ends -----------------------------------------------------------------------------------------

    def _complete(self, *, reusable: bool) -> None:
        self._over()
        if self._wraps:
            self._client.send(LAST_CHUNK)
        reusable = reusable and self._reply.keep_alive and self.request_sent
        self._client_identity.reply_done(reusable=reusable, keep=self._keep, died=self._died())

    def _break(self, error: RouterError, *, hangs: bool = False) -> None:
        """Bytes are out, and there will be no more of them. `hangs`: the silence is the server's own."""
        words = stream_error(api_of(self._path), self._content_type(), error, sent=self.tail() or b"\n\n")
        body = self._body
        self._drop()
        if self._wraps:
            possible = True
        elif isinstance(body, Chunked) and self._payload is None:
            possible = body.at_boundary
        else:
            possible = isinstance(body, UntilClose | Chunked)
        in_chunks = self._wraps or (self._reply.chunked and self._payload is None)
        if not words or not possible:
            in_chunks = False
            self._client.abort()
        else:
            self._client.send(chunk(words) + LAST_CHUNK if in_chunks else words)
        # Its end in chunks is as whole as any: the client may be about to send its next request.
        self._client_identity.reply_broken(error, keep=in_chunks and self._keep, died=hangs or self._died())

    def _died(self) -> bool:
        reply = self._reply
        if reply.is_stream is None:
            reply.is_stream = self._content_type().startswith((NDJSON, SSE))
        if reply.status == 200 and not reply.is_stream:
            return False
        return runner_died(reply.status, reply.is_stream, self._path, self.tail())

    def _content_type(self) -> str:
        return (header(self._reply.headers, b"content-type") or b"").decode("latin-1")

    def _over(self) -> None:
        self._phase = _OVER
        self.last_byte_at = self._now()
        self._passed += self.connection.taken_back()
        self.connection.receiver = None

    def _drop(self) -> None:
        self._over()
        self.connection.abort()

    # --- from outside ----------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client is gone: the server is told at once, by a connection that is cut."""
        self._drop()

    def pause(self) -> None:
        """The client takes no more for now."""
        self.connection.transport.pause_reading()

    def resume(self) -> None:
        self.connection.transport.resume_reading()

    def check(self, now: float) -> None:
        """Looks at the deadlines; to be called now and then."""
        if self._phase == _RELAYED and self.bytes_out != self._seen_bytes:
            self._seen_bytes = self.bytes_out
            self._due = now + self._limits.idle_timeout_seconds
        if now < self._due:
            return
        if self._phase == _AWAITED:
            seconds = self._limits.first_byte_timeout_seconds
            self._drop()
            late = WaitTimeout(f"no answer within {seconds:.0f} s (stream.first_byte_timeout_seconds)")
            self._client_identity.reply_failed(late, hangs=True)
        elif self._phase == _HELD:
            self._judge_held(MORE, 0)
        elif self._phase == _RELAYED:
            seconds = self._limits.idle_timeout_seconds
            late = WaitTimeout(f"the stream was silent for {seconds:.0f} s (stream.idle_timeout_seconds)")
            self._break(late, hangs=not self._client.write_paused)
