"""Reads the body of one request that the proxy serves itself: into memory within a limit, or only to discard it.

Chunks are decoded, so that the body can be parsed and forwarded with its length. A long body is parsed as it comes,
without its long strings (`router/llm_api/json_skimmer.py`). A body is in memory once: its pieces are appended to one
buffer, and `body` returns that buffer's bytes without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Final

from msgspec import structs

from router.http1.body_framing import MORE
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.fast_body_reader import parse_body_fast
from router.llm_api.json_edit import find_member
from router.llm_api.json_skimmer import Beginning, JsonSkimmer
from router.llm_api.limits import RequestLimits

UNREAD_BYTES_MAX: Final = 65536
"""A refused request with a body up to this length is read to its end, and its connection stays open."""

LONG_BODY_BYTES: Final = 262_144
"""A body of at least this length is long."""

HELD_BYTES: Final = 4096
"""The end of a long body is not sent before all of it has come: short members often stand there."""


class RequestBodyReader:
    """Feed it until `feed` returns bytes; then `body` is complete."""

    __slots__ = (
        "_body", "_chunks", "_discards", "_last_piece", "_last_piece_at", "_limits", "_skimmer", "_stored", "count",
        "length", "received_bytes", "sendable_bytes",
    )  # fmt: skip

    def __init__(self, head: RequestHead, limits: RequestLimits, *, discards: bool = False, skims: bool = True) -> None:
        """`discards`: nothing of the body is kept. `skims`: a long body is parsed as it comes."""
        self.count = 0
        """Pieces fed so far."""
        self.length = head.length or 0
        self.received_bytes = 0
        """With the framing of chunks."""
        self.sendable_bytes = 0
        """As much of an incomplete long body may be sent: it is no JSON value that a server would act on."""
        self._last_piece = b""
        self._last_piece_at = 0
        """Where it begins in the body."""
        self._stored = BytesIO()
        self._chunks: list[bytes] | None = [] if head.chunked and not discards else None
        """Decoded data of the last piece."""
        self._body = head.body(self._chunks)
        self._limits = limits
        self._discards = discards
        self._skimmer = JsonSkimmer() if skims and self.length >= LONG_BODY_BYTES and not discards else None

    @property
    def is_long(self) -> bool:
        return self._skimmer is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the body so far, without framing."""
        return self._stored.tell()

    def feed(self, data: bytes) -> bytes | None:
        """Returns the bytes after the body's end, or None until then.

        Raises:
            FramingError: its chunks are malformed.
            BodyTooLarge: it is longer than `server.max_body_bytes`; must not be fed any more.
        """
        end = self._body.feed(data)
        piece = data if end == MORE else data[:end]
        self.count += 1
        self.received_bytes += len(piece)
        if not self._discards:
            self._limits.check_body_size(self.received_bytes)
            self._store(piece)
        return None if end == MORE else data[end:]

    def _store(self, piece: bytes) -> None:
        stored, chunks = self._stored, self._chunks
        if chunks is not None:
            stored.writelines(chunks)
            chunks.clear()
            return
        skimmer = self._skimmer
        if skimmer is not None:
            self._last_piece, self._last_piece_at = piece, stored.tell()
            skimmer.feed(piece)
        stored.write(piece)
        if skimmer is not None and not skimmer.may_have_ended:
            self.sendable_bytes = max(0, stored.tell() - HELD_BYTES)

    def body(self) -> bytes:
        """What has been stored. The buffer shares its bytes as long as nothing is fed."""
        return self._stored.getvalue()

    def parts(self, start: int, end: int) -> Iterator[bytes | memoryview]:
        """Bytes of a long body that have been stored; of the last piece without a copy."""
        last = max(start, self._last_piece_at)
        if start < last:
            with self._stored.getbuffer() as view:
                earlier = bytes(view[start : min(end, last)])
            yield earlier
        if last < end:
            yield memoryview(self._last_piece)[last - self._last_piece_at : end - self._last_piece_at]

    def overwrite(self, start: int, value: bytes) -> None:
        """Puts other bytes in the place of as many. Call it before `body`, so that nothing is copied."""
        stored = self._stored
        size = stored.tell()
        stored.seek(start)
        stored.write(value)
        stored.seek(size)
        if start + len(value) > self._last_piece_at:
            self._last_piece, self._last_piece_at = b"", size

    def release(self) -> None:
        """Frees the body, which is not needed any more."""
        self._stored = BytesIO()
        self._last_piece = b""

    def beginning(self, path: str) -> Beginning | None:
        """What a long body begins with; None if that does not say which model it is for."""
        return None if self._skimmer is None else self._skimmer.beginning(path)

    def find(self, name: str) -> tuple[int, int] | None:
        """Where the value of a member is in a complete long body; None if that is not certain."""
        text = None if self._skimmer is None else self._skimmer.text()
        span = None if text is None else find_member(text, name)
        if span is None or self._skimmer is None:
            return None
        return self._skimmer.place(span[0]), self._skimmer.place(span[1])

    def parse(self, path: str) -> ParsedBody:
        """Parses the complete body; if long, without its long strings.

        Raises:
            BadRequest: it has too many parts to be parsed within bounds.
        """
        text = None if self._skimmer is None else self._skimmer.text()
        if text is None or self._skimmer is None:
            return parse_body(self.body(), path)
        parsed = parse_body_fast(text, path) or parse_body(text, path)
        return structs.replace(parsed, prompt_bytes=parsed.prompt_bytes + self._skimmer.text_bytes)


def is_worth_reading(head: RequestHead) -> bool:
    """Whether to read a refused request's body to its end; one that awaits `100 Continue` never comes."""
    return not head.chunked and (head.length or 0) <= UNREAD_BYTES_MAX and not head.expects_continue
