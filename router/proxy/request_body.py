"""Takes in the body of one request that the relay answers itself: whole, within a limit, or only to be thrown away.

Chunks are taken off, so that the body can be read and sent on with its length. A long body is read while it comes, by
what is left of it without its long strings (`router/llm_api/json_skimmer.py`). It waits for nobody and sends nothing.
"""

from __future__ import annotations

from typing import Final

from msgspec import structs

from router.errors import BodyTooLarge
from router.http1.body_framing import MORE
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.fast_body_reader import parse_body_fast
from router.llm_api.json_skimmer import JsonSkimmer

UNREAD_BYTES_MAX: Final = 65536
"""A refused request whose body is no longer than that is read to its end, and its connection kept."""

SMALL_PIECES_MAX: Final = 1024

LONG_BYTES: Final = 262_144
"""A body of that length is long."""


class RequestBodyReader:
    """`feed` it until it gives something; then the body is whole: `joined`, or `pieces` in order."""

    __slots__ = (
        "_compacted",
        "_limit_bytes",
        "_machine",
        "_reduced",
        "_size",
        "_thrown_away",
        "count",
        "holds_still",
        "length",
        "pieces",
    )

    def __init__(self, head: RequestHead, limit_bytes: int, *, throw_away: bool = False) -> None:
        self.pieces: list[bytes] = []
        self.count = 0
        self.holds_still = False
        """Whether somebody counts the pieces: then they stay as they are."""
        self.length = head.length or 0
        self._machine = head.body(self.pieces if head.chunked and not throw_away else None)
        self._limit_bytes = limit_bytes
        self._thrown_away = throw_away or head.chunked
        self._size = 0
        self._compacted = 0
        self._reduced = JsonSkimmer() if self.length >= LONG_BYTES and not throw_away else None

    @property
    def is_long(self) -> bool:
        return self._reduced is not None

    def feed(self, data: bytes) -> bytes | None:
        """What came after the body's end, or None while it goes on.

        Raises:
            FramingError: its chunks are malformed.
            BodyTooLarge: it is longer than `server.max_body_bytes`; no more must be fed.
        """
        end = self._machine.feed(data)
        piece = data if end == MORE else data[:end]
        if not self._thrown_away:
            self.pieces.append(piece)
            if self._reduced is not None:
                self._reduced.feed(piece)
        self.count += 1
        self._size += len(piece)
        if self._size > self._limit_bytes:
            raise too_large(self._limit_bytes)
        if len(self.pieces) - self._compacted > SMALL_PIECES_MAX and not self.holds_still:
            self._compact()
        return None if end == MORE else data[end:]

    def _compact(self) -> None:
        """Makes one of many pieces: a body that comes byte by byte would take forty times its size."""
        self.pieces[self._compacted :] = [b"".join(self.pieces[self._compacted :])]
        self._compacted += 1

    def joined(self) -> bytes:
        body = b"".join(self.pieces)
        self.pieces[:] = [body]
        return body

    def forget(self) -> None:
        """Nobody will want the body again."""
        self.pieces = []

    def model(self) -> str | None:
        """The model that the body begins with, if it does."""
        return None if self._reduced is None else self._reduced.model()

    def seen(self, path: str) -> ParsedBody:
        """What the whole body says; its members are looked for in what is left without long strings.

        Raises:
            BadRequest: it has too many parts to be looked at within bounds.
        """
        text = None if self._reduced is None else self._reduced.text()
        if text is None or self._reduced is None:
            return parse_body(self.joined(), path)
        seen = parse_body_fast(text, path) or parse_body(text, path)
        return structs.replace(seen, prompt_bytes=seen.prompt_bytes + self._reduced.text_bytes)


def is_worth_reading(head: RequestHead) -> bool:
    """Whether the body of a refused request is better read than cut off; one that awaits our word will not come."""
    return not head.chunked and (head.length or 0) <= UNREAD_BYTES_MAX and not head.awaits_word


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit_bytes} bytes (server.max_body_bytes)")
