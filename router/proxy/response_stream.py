"""Relays one reply from a server's connection to the client: parses its head and forwards the bytes as they came.

Only the end of the body is looked for. A client of HTTP/1.0 does not support chunks and gets the data without them.
After the first byte every failure ends the response visibly: with an error in the protocol's own form where the framing
allows one, otherwise by cutting the connection. Whether a reply that failed before that is retried is decided by its
`ResponseOwner`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from router.errors import InstanceLost, RouterError, RunnerDied, ServerRefused, StreamTruncated
from router.http1.body_framing import MORE, Body, Chunked, FramingError, NoBody, Sized, UntilClose
from router.http1.headers import header, is_stream, reply_headers
from router.http1.parser import HeadError, ReplyHead, RequestHead
from router.http1.response_writer import LAST_CHUNK, chunk, interim_head, relayed_head
from router.llm_api.errors import api_of, stream_error
from router.llm_api.heartbeat_format import refusal
from router.llm_api.limits import RequestLimits
from router.llm_api.stream_end import BAD_OPTION, RUNNER_DIED, TAIL_BYTES, StreamEnd, end_of_stream, runner_died
from router.proxy.interfaces import Client, ResponseOwner
from router.proxy.upstream_pool import ONE_CHUNK, TOKEN_ENDS, UpstreamConnection

HELD_BYTES_MAX: Final = 65536
HELD_SECONDS: Final = 10.0
"""Bounds on how much of a reply with status 500 or more is held back, since the request may be tried again."""

_AWAITED, _HELD, _RELAYED, _OVER = range(4)
_SIZE_LINE = re.compile(rb"\r\n[0-9A-Fa-f]{1,15}(?:;[^\r\n]*)?\r\n")
_LAST_CHUNK = re.compile(rb"\r\n0{1,15}(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*+(?:\r\n)?\Z")
"""With its trailers."""
_NO_BODY: Final = NoBody()
_NO_HEAD: Final = ReplyHead()


class ResponseStream:
    """The receiver of `connection` for one request. Defaults are class attributes, so that a stream stores little."""

    request_sent = True
    """False while pieces of the body are still to be written."""
    is_last_attempt = False
    """Then even a reply that reports a dead runner is relayed."""
    is_bad_option = False
    """Whether the status 500 blames an option of the request: no failure of the server."""
    head_sent = False
    """Whether a heartbeat has sent a head with status 200, after which the client gets chunks (HTTP/1.0: bytes)."""
    status = 0
    first_byte_at: float | None = None
    last_byte_at: float | None = None
    bytes_out = 0
    """Set once the reply is over, as are the next two."""
    chunks = 0
    tail = b""
    """The end of the reply's data, without framing."""
    error_code = ""
    """Of a stream that was relayed whole and ends with an error."""
    _received = False
    """Whether any byte of the reply has come."""
    _phase = _AWAITED
    _body: Body = _NO_BODY
    _payload: list[bytes] | None = None
    """If a list, the body's data is collected in it without the server's chunks."""
    _rechunks = False
    """Whether the client gets chunks that are made here."""
    _keep = False
    _reply = _NO_HEAD
    _passed = 0
    """What the connection passed on by itself before, in its own count."""
    _bytes = 0
    """Bytes relayed otherwise."""
    _raw_tail = b""
    """The end of what has come since the last piece that ended as a token does, with framing."""
    _checked_bytes = -1
    """Bytes relayed at the last check of the deadlines."""

    def __init__(
        self,
        owner: ResponseOwner,
        client: Client,
        request: RequestHead,
        path: str,
        connection: UpstreamConnection,
        limits: RequestLimits,
        now: Callable[[], float],
    ) -> None:
        self._owner = owner
        self._client = client
        self._request = request
        self._path = path
        self._limits = limits
        self._now = now
        self._held: list[bytes] = []
        self._due = now() + limits.first_byte_timeout_seconds
        self.connection = connection
        connection.receiver = self

    # --- from the server -------------------------------------------------------------------------------------

    def reply_bytes(self, data: bytes) -> None:
        if self._phase == _RELAYED:
            self._relay(data)
        elif self._phase == _AWAITED:
            if self._received:
                self._read_head(data)
                return
            self._received = True
            start = data.find(b"\r\n\r\n") + 4
            cached = self.connection.pool.heads.get(data[:start]) if start > 3 else None
            if cached is None:
                self._reply = ReplyHead()
                self._read_head(data)
                return
            self._reply = cached
            if cached.status == 200 and cached.length == len(data) - start and not self.head_sent:
                self._relay_whole(cached, data, start)
            else:
                self._head_read(data, start)
        elif self._phase == _HELD:
            self._hold(data)

    def reply_ended(self, error: Exception | None) -> None:
        if self._phase == _AWAITED:
            cause = "closed before its reply" if error is None else f"lost: {error}"
            stale = self.connection.reused and not self._received
            self._end()
            self._owner.reply_lost(InstanceLost(f"the connection to the instance was {cause}"), stale=stale)
        elif self._phase == _HELD and error is None and self._body.closed():
            self._judge_held(MORE, 0)
            if self._phase == _RELAYED:
                self._complete(reusable=False)
        elif self._phase == _HELD:
            self._end()
            self._owner.reply_lost(InstanceLost("the instance died during its reply"), stale=False)
        elif self._phase == _RELAYED:
            if error is None and self._body.closed():
                if self._is_truncated():
                    self._end_truncated(b"")
                else:
                    self._complete(reusable=False)
            else:
                self._break(InstanceLost("the instance died during its reply"))

    def upstream_full(self) -> None:
        self._owner.request_blocked(blocked=True)

    def upstream_drained(self) -> None:
        self._owner.request_blocked(blocked=False)

    def mark_request_sent(self) -> None:
        """The last of the request is written: the timeout of the first byte starts."""
        self.request_sent = True
        if self._phase == _AWAITED:
            self._due = self._now() + self._limits.first_byte_timeout_seconds

    @property
    def has_begun(self) -> bool:
        """Whether bytes of the reply are out."""
        return self._phase >= _RELAYED

    @property
    def chunks_so_far(self) -> int:
        """As `chunks`, while the reply runs."""
        return self._body.chunks + (self._passed + self.connection.passed) // ONE_CHUNK

    def _read_head(self, data: bytes) -> None:
        start = 0
        while True:
            is_begun = self._reply.is_begun
            try:
                end = self._reply.feed(data, start)
            except HeadError as error:
                self._invalid(error.message)
                return
            if end < 0:
                return
            if self._reply.status >= 200:
                break
            if self._reply.status == 101:
                self._invalid("it switches protocols unasked")
                return
            if self._reply.status != 100 and self._request.minor:
                self._client.send(interim_head(self._reply, reply_headers(self._reply.headers)))
            self._reply = ReplyHead()
            start = end
        if not is_begun:
            self.connection.pool.remember(data[start:end], self._reply)
        self._head_read(data, end)

    def _head_read(self, data: bytes, end: int) -> None:
        """The head is complete and ends at `end` in `data`."""
        reply = self._reply
        self.status = reply.status
        is_late_refusal = self.head_sent and reply.status != 200
        self._payload = [] if reply.chunked and (is_late_refusal or not self._request.minor) else None
        self._body = reply.body(payload=self._payload)
        rest = data[end:] if end < len(data) else b""
        if is_late_refusal or reply.status >= 500:
            self._phase = _HELD
            self._due = self._now() + HELD_SECONDS
            self._hold(rest)
        else:
            self._begin(rest)

    def _invalid(self, cause: str) -> None:
        self._drop()
        self._owner.reply_failed(InstanceLost(f"invalid reply from the instance: {cause}"))

    def _hold(self, data: bytes) -> None:
        """Holds back a reply that may report a dead runner until that is known."""
        try:
            end = self._body.feed(data)
        except FramingError as error:
            self._invalid(str(error))
            return
        self._held.append(data)
        if end != MORE or sum(map(len, self._held)) > HELD_BYTES_MAX:
            self._judge_held(end, len(data))

    def _judge_held(self, end: int, last_bytes: int) -> None:
        held = b"".join(self._held)
        self._held = []
        if not self.is_last_attempt and any(message in held for message in RUNNER_DIED):
            self._drop()
            self._owner.reply_lost(RunnerDied(held.decode(errors="replace")), stale=False)
            return
        self.is_bad_option = BAD_OPTION.search(held) is not None
        if self.status >= 500 and not self.is_bad_option and self._owner.may_try_elsewhere(self.status):
            body = held if self._payload is None else b"".join(self._payload)
            self._drop()
            self._owner.reply_refused(refusal(self.status, body))
            return
        extra = 0 if end == MORE else last_bytes - end
        if self.head_sent and self.status != 200:
            body = held if self._payload is None else b"".join(self._payload)
            self._drop()
            self._owner.reply_failed(refusal(self.status, body))
            return
        self._open(held[: len(held) - extra])
        if end != MORE:
            self._complete(reusable=not extra)

    # --- to the client ---------------------------------------------------------------------------------------

    def _relay_whole(self, reply: ReplyHead, data: bytes, start: int) -> None:
        """The fast path: `data` is a whole reply with status 200 and a length; its body begins at `start`."""
        client = self._client
        self.status = 200
        added_headers = self._owner.response_begins()
        keep = client.may_keep()
        client.send(relayed_head(reply, added_headers, self._request, keep=keep) + data[start:])
        self._phase = _OVER
        self.first_byte_at = self.last_byte_at = self._now()
        self.bytes_out = len(data) - start
        self.tail = data[max(start, len(data) - TAIL_BYTES) :]
        self.connection.receiver = None
        died = reply.is_stream is not False and self._died()
        self._owner.reply_done(reusable=reply.keep_alive and self.request_sent, keep=keep, died=died)

    def _begin(self, rest: bytes) -> None:
        try:
            end = self._body.feed(rest)
        except FramingError as error:
            self._invalid(str(error))
            return
        if end == MORE:
            self._open(rest)
        elif self._open(rest[:end], is_last=True):
            self._complete(reusable=end == len(rest))

    def _open(self, piece: bytes, *, is_last: bool = False) -> bool:
        """Sends the response's head with the available part of its body: from here on bytes are out.

        Returns False if that ended the response.
        """
        self._phase = _RELAYED
        self._due = self._now() + self._limits.idle_timeout_seconds
        added_headers = self._owner.response_begins()
        if self._client.write_paused:
            self.pause()
        reply, request = self._reply, self._request
        self._rechunks = self.head_sent and bool(request.minor) and not reply.chunked
        is_framed = self._rechunks or (self._payload is None and not isinstance(self._body, UntilClose))
        self._keep = is_framed and self._client.may_keep() and (not self.head_sent or bool(request.minor))
        head = b""
        if not self.head_sent:
            head = relayed_head(reply, added_headers, request, keep=self._keep)
        if piece:
            self._count(piece)
        if is_last and self._is_truncated():
            self._end_truncated(piece, head)
            return False
        self._client.send(head + self._for_client(piece))
        return True

    def _relay(self, data: bytes) -> None:
        self._passed += self.connection.stop_passing()
        try:
            end = self._body.feed(data)
        except FramingError:
            self._cut_malformed()
            return
        piece = data if end == MORE else data[:end]
        self._count(piece)
        if end != MORE and self._is_truncated():
            self._end_truncated(piece)
            return
        if self._payload is not None or self._rechunks:
            piece = self._for_client(piece)
        if piece:
            self._client.send(piece)
        if end != MORE:
            self._complete(reusable=end == len(data))
        elif data.endswith(TOKEN_ENDS) and self._payload is None and not self._rechunks:
            self._raw_tail = b""
            if isinstance(self._body, Chunked) and self._body.at_boundary:
                self.connection.pass_tokens(self._client.send)

    def _cut_malformed(self) -> None:
        self._drop()
        self._client.abort()
        self._owner.reply_broken(InstanceLost("the instance sent a malformed reply"), keep=False, died=False)

    def _for_client(self, piece: bytes) -> bytes:
        payload = self._payload
        if payload is not None:
            piece = b"".join(payload)
            payload.clear()
        return chunk(piece) if self._rechunks and piece else piece

    def _count(self, piece: bytes) -> None:
        if self.first_byte_at is None:
            self.first_byte_at = self._now()
        self._bytes += len(piece)
        if len(piece) >= TAIL_BYTES:
            self._raw_tail = piece[-TAIL_BYTES:]
        else:
            self._raw_tail = (self._raw_tail + piece)[-TAIL_BYTES:]

    # --- how it ends -----------------------------------------------------------------------------------------

    def _complete(self, *, reusable: bool) -> None:
        self._end()
        if self._rechunks:
            self._client.send(LAST_CHUNK)
        reusable = reusable and self._reply.keep_alive and self.request_sent
        died = self._died()
        if self.status == 200 and self._is_stream() and end_of_stream(self._path, self.tail) is StreamEnd.ERROR:
            self.error_code = InstanceLost.code if died else ServerRefused.code
        self._owner.reply_done(reusable=reusable, keep=self._keep, died=died)

    def _is_truncated(self) -> bool:
        """Whether the stream that is now over lacks its protocol's end mark, and can still be ended otherwise."""
        if self.status != 200 or not self._is_stream() or (isinstance(self._body, Sized) and not self._rechunks):
            return False
        return end_of_stream(self._path, self._data_tail()) is StreamEnd.MISSING

    def _end_truncated(self, piece: bytes, head: bytes = b"") -> None:
        """Ends the stream with an error where its server, with `piece`, ended it as if it were complete."""
        passes_chunks = self._reply.chunked and self._payload is None
        rest = _without_last_chunk(piece) if passes_chunks else self._for_client(piece)
        self._drop()
        error = StreamTruncated(
            "the instance ended the stream without its end mark: its runner died, or the model repeated itself and "
            "was stopped; the answer is incomplete"
        )
        in_chunks = self._rechunks or passes_chunks
        if rest is None:
            self._client.abort()
        else:
            message = stream_error(api_of(self._path), self._content_type(), error, sent=self.tail or b"\n\n")
            self._client.send(head + rest + (chunk(message) + LAST_CHUNK if in_chunks else message))
        keep = in_chunks and self._keep and rest is not None
        self._owner.reply_broken(error, keep=keep, died=self._died())

    def _break(self, error: RouterError, *, hangs: bool = False, runner_lives: bool = False) -> None:
        """Bytes are out, and no more will be sent. `hangs`: the server is silent, not the client slow."""
        body = self._body
        self._drop()
        message = stream_error(api_of(self._path), self._content_type(), error, sent=self.tail or b"\n\n")
        if self._rechunks:
            can_append = True
        elif isinstance(body, Chunked) and self._payload is None:
            can_append = body.at_boundary
        else:
            can_append = isinstance(body, UntilClose | Chunked)
        in_chunks = self._rechunks or (self._reply.chunked and self._payload is None)
        if not message or not can_append:
            in_chunks = False
            self._client.abort()
        else:
            self._client.send(chunk(message) + LAST_CHUNK if in_chunks else message)
        # With chunks the framing is complete: the client may already be sending its next request.
        died = hangs or (not runner_lives and self._died())
        self._owner.reply_broken(error, keep=in_chunks and self._keep, died=died)

    def _died(self) -> bool:
        is_stream = self._is_stream()
        if self.status == 200 and not is_stream:
            return False
        return runner_died(self.status, is_stream, self._path, self.tail)

    def _is_stream(self) -> bool:
        reply = self._reply
        if reply.is_stream is None:
            reply.is_stream = is_stream(reply.headers)
        return reply.is_stream

    def _content_type(self) -> str:
        return (header(self._reply.headers, b"content-type") or b"").decode("latin-1")

    def _end(self) -> None:
        self._phase = _OVER
        self.last_byte_at = self._now()
        passed = self._passed + self.connection.stop_passing()
        self.connection.receiver = None
        self.chunks = self._body.chunks + passed // ONE_CHUNK
        self.bytes_out = self._bytes + passed % ONE_CHUNK
        self.tail = self._data_tail()

    def _data_tail(self) -> bytes:
        """The end of what has come, without framing."""
        tail = self._raw_tail
        if not self._reply.chunked:
            return tail
        return _SIZE_LINE.sub(b"", _LAST_CHUNK.sub(b"\r\n", b"\r\n" + tail)).removesuffix(b"\r\n")

    def _drop(self) -> None:
        self._end()
        self.connection.abort()

    # --- from the exchange -----------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client is gone: cuts the server's connection, which stops its work at once."""
        self._drop()

    def cut(self, error: RouterError) -> None:
        """Ends a reply of which bytes are out with an error, as far as its framing allows one."""
        self._break(error, runner_lives=True)

    def pause(self) -> None:
        """The client takes no more for now."""
        self.connection.transport.pause_reading()

    def resume(self) -> None:
        self.connection.transport.resume_reading()

    def check(self, now: float) -> None:
        """Checks the deadlines; to be called periodically."""
        if self._phase == _RELAYED:
            relayed_bytes = self._bytes + (self._passed + self.connection.passed) % ONE_CHUNK
            if relayed_bytes != self._checked_bytes:
                self._checked_bytes = relayed_bytes
                self._owner.progressed(now)
                self._due = now + self._limits.idle_timeout_seconds
        if now < self._due:
            return
        if self._phase == _AWAITED:
            self._drop()
            self._owner.reply_failed(self._limits.first_byte_timeout(), hangs=True)
        elif self._phase == _HELD:
            self._judge_held(MORE, 0)
        elif self._phase == _RELAYED:
            self._break(self._limits.idle_timeout(), hangs=not self._client.write_paused)


def _without_last_chunk(piece: bytes) -> bytes | None:
    """The last piece of a chunked body without the chunk that ends it; None if that began in an earlier piece."""
    rest = piece.removesuffix(LAST_CHUNK)
    return rest if len(rest) < len(piece) and (not rest or rest.endswith(b"\n")) else None
