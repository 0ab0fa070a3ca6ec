"""Takes in the body of one request that the relay answers itself: whole, within a limit, or only to be thrown away.

Chunks are taken off, so that the body can be read and sent on with its length. It waits for nobody and sends nothing.
"""

from __future__ import annotations

from typing import Final

from router.errors import BodyTooLarge
from router.relay.framing import MORE
from router.relay.heads import RequestHead

UNREAD_BYTES_MAX: Final = 65536
"""A refused request whose body is no longer than that is read to its end, and its connection kept."""


class Intake:
    """`feed` it until it gives something; then `body` is whole."""

    __slots__ = ("_chunked", "_limit_bytes", "_machine", "_pieces", "_size", "_thrown_away", "body")

    def __init__(self, head: RequestHead, limit_bytes: int, *, throw_away: bool = False) -> None:
        self._pieces: list[bytes] = []
        self._chunked = head.chunked
        self._machine = head.body(self._pieces if head.chunked and not throw_away else None)
        self._limit_bytes = limit_bytes
        self._thrown_away = throw_away
        self._size = 0
        self.body = b""

    def feed(self, data: bytes) -> bytes | None:
        """What came after the body's end, or None while it goes on.

        Raises:
            FramingError: its chunks are malformed.
            BodyTooLarge: it is longer than `server.max_body_bytes`; no more must be fed.
        """
        end = self._machine.feed(data)
        piece = data if end == MORE else data[:end]
        if not self._thrown_away and not self._chunked:
            self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._limit_bytes:
            raise too_large(self._limit_bytes)
        if end == MORE:
            return None
        self.body, self._pieces = b"".join(self._pieces), []
        return data[end:]


def is_worth_reading(head: RequestHead) -> bool:
    """Whether the body of a refused request is better read than cut off; one that awaits our word will not come."""
    return not head.chunked and (head.length or 0) <= UNREAD_BYTES_MAX and not head.awaits_word


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit_bytes} bytes (server.max_body_bytes)")
