"""A connection to a server with OpenAI's API that looks like one to an Ollama server.

It is between the real connection and the `ResponseStream`: reads the server's reply, translates it, and passes it on as
the bytes of an Ollama server's reply. So deadlines, flow control, retries and the end of a stream are those of every
other reply. The real connection goes back to the pool once the whole reply has come.
"""

from __future__ import annotations

from typing import Final

import msgspec

from router.http1.body_framing import MORE, Body, Chunked, FramingError, NoBody
from router.http1.headers import header
from router.http1.parser import HeadError, ReplyHead
from router.http1.response_writer import LAST_CHUNK, chunk
from router.llm_api.errors import JSON, NDJSON
from router.llm_api.translation.events import EventTooLong
from router.llm_api.translation.reply import BadReply, ReplyTranslator, error_text
from router.proxy.upstream_pool import UpstreamConnection

WHOLE_BYTES_MAX: Final = 256 * 2**20
"""Of a reply that is translated as a whole."""
_STREAM: Final = b"text/event-stream"
_STREAM_HEAD: Final = (
    f"HTTP/1.1 200 OK\r\nContent-Type: {NDJSON}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
)
"""The connection is not closed, but neither is this object used again."""


class TranslatedConnection(UpstreamConnection):
    """For one request. `receiver` gets the translated reply."""

    __slots__ = (
        "_body", "_head", "_inner", "_is_over", "_is_pooled", "_is_stream", "_is_whole", "_pieces", "_size",
        "_translator", "_wants_stream",
    )  # fmt: skip

    def __init__(
        self, inner: UpstreamConnection, translator: ReplyTranslator, *, wants_stream: bool, is_pooled: bool
    ) -> None:
        """`wants_stream`: whether the client expects lines. `is_pooled`: whether the connection is used again."""
        super().__init__(inner.pool, inner.url)
        self.transport = inner.transport
        self.reused = inner.reused
        self._inner = inner
        self._translator = translator
        self._wants_stream = wants_stream
        self._is_pooled = is_pooled
        self._is_over = False
        self._head = ReplyHead()
        self._body: Body | None = None
        self._pieces: list[bytes] = []
        """Data of the reply that has come and is not translated yet, without framing."""
        self._size = 0
        self._is_stream = False
        self._is_whole = False
        """Whether all of the reply has come, and nothing after it."""
        inner.receiver = self

    # --- from the server's connection ------------------------------------------------------------------------

    def reply_bytes(self, data: bytes) -> None:
        try:
            self._read(data)
        except (HeadError, FramingError, EventTooLong) as error:
            self._give_up(f"invalid reply from the model's server: {error}")
        except BadReply as error:
            self._give_up(str(error))

    def reply_ended(self, error: Exception | None) -> None:
        body = self._body
        if error is None and body is not None and body.closed():
            try:
                self._complete()
            except (BadReply, EventTooLong) as found:
                self._give_up(str(found))
        elif self.receiver is not None:
            self.receiver.reply_ended(error)

    def upstream_full(self) -> None:
        self.pause_writing()

    def upstream_drained(self) -> None:
        self.resume_writing()

    def _read(self, data: bytes) -> None:
        body, start = self._body, 0
        if body is None:
            start = self._read_head(data)
            body = self._body
            if body is None:
                return
        end = body.feed(data, start)
        if not isinstance(body, Chunked):
            self._pieces.append(data[start:] if end == MORE else data[start:end])
        if self._is_stream:
            self._translate()
        else:
            self._size += len(data)
            if self._size > WHOLE_BYTES_MAX:
                raise BadReply(f"the reply of the model's server is longer than {WHOLE_BYTES_MAX} bytes")
        if end != MORE:
            self._is_whole = end == len(data)
            self._complete()

    def _read_head(self, data: bytes) -> int:
        """Returns where the body begins; `_body` stays None until the head is complete."""
        start = 0
        while True:
            end = self._head.feed(data, start)
            if end < 0:
                return 0
            if self._head.status >= 200:
                break
            self._head, start = ReplyHead(), end
        head = self._head
        body = head.body(payload=self._pieces)
        self._is_stream = head.status == 200 and (header(head.headers, b"content-type") or b"").startswith(_STREAM)
        self._body = body
        if self._is_stream:
            self.data_received(_STREAM_HEAD)
        return end

    def _translate(self) -> None:
        pieces = self._pieces
        if not pieces:
            return
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        for line in self._translator.feed(piece):
            self.data_received(chunk(line))

    def _complete(self) -> None:
        """All of the reply has come."""
        if self._is_stream:
            lines = self._translator.end()
            self.data_received(b"".join(map(chunk, lines)) + LAST_CHUNK)
            return
        status, body = self._head.status, b"".join(self._pieces)
        self._pieces.clear()
        if status == 200:
            self._reply(200, self._translator.whole(body))
        elif 200 < status < 400:
            self._reply(502, _error(f"the model's server answers with status {status}"))
        else:
            self._reply(status, _error(error_text(body)))

    def _reply(self, status: int, body: bytes) -> None:
        """A whole reply."""
        is_line = status == 200 and self._wants_stream
        body = body + b"\n" if is_line else body
        head = (
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: {NDJSON if is_line else JSON}\r\n"
        )
        self.data_received(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

    def _give_up(self, message: str) -> None:
        """The reply cannot be translated: an error in its place, or at its end."""
        self._is_whole, self._body = False, NoBody()
        self._inner.receiver = None
        if self._is_stream:
            self.data_received(chunk(self._translator.error_line(message)) + LAST_CHUNK)
        else:
            self._reply(502, _error(message))

    # --- from the exchange -----------------------------------------------------------------------------------

    def abort(self) -> None:
        """Ends the use of the real connection, which goes back to its pool if the reply was whole."""
        self.receiver = None
        if self._is_over:
            return
        self._is_over = True
        if self._is_whole and self._is_pooled and self._head.keep_alive:
            self.pool.release(self._inner)
        else:
            self._inner.abort()


def _error(message: str) -> bytes:
    return msgspec.json.encode({"error": message})
