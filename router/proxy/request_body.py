"""Reads the body of one request that the proxy serves itself: into memory within a limit, or only to discard it.

Chunks are decoded, so that the body can be parsed and forwarded with its length. A long body is parsed as it comes,
without its long strings (`router/llm_api/json_skimmer.py`).
"""

from __future__ import annotations

from typing import Final

from msgspec import structs

from router.http1.body_framing import MORE
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.fast_body_reader import parse_body_fast
from router.llm_api.json_skimmer import JsonSkimmer
from router.llm_api.limits import RequestLimits

UNREAD_BYTES_MAX: Final = 65536
"""A refused request with a body up to this length is read to its end, and its connection stays open."""

SMALL_PIECES_MAX: Final = 1024

LONG_BODY_BYTES: Final = 262_144
"""A body of at least this length is long."""


class RequestBodyReader:
    """Feed it until `feed` returns bytes; then the body is complete: `joined`, or `pieces` in order."""

    __slots__ = (
        "_body", "_body_bytes", "_compacted", "_discards", "_limits", "_skimmer", "_stores_pieces", "count", "length",
        "pieces", "pieces_frozen",
    )  # fmt: skip

    def __init__(self, head: RequestHead, limits: RequestLimits, *, discards: bool = False, skims: bool = True) -> None:
        """`discards`: nothing of the body is kept. `skims`: a long body is parsed as it comes."""
        self.pieces: list[bytes] = []
        self.count = 0
        """Pieces fed so far."""
        self.pieces_frozen = False
        """Whether `pieces` must not be compacted, because their indexes are in use."""
        self.length = head.length or 0
        self._body = head.body(self.pieces if head.chunked and not discards else None)
        self._limits = limits
        self._discards = discards
        self._stores_pieces = not (discards or head.chunked)  # decoded chunks are added by `_body`
        self._body_bytes = 0
        self._compacted = 0
        self._skimmer = JsonSkimmer() if skims and self.length >= LONG_BODY_BYTES and not discards else None

    @property
    def is_long(self) -> bool:
        return self._skimmer is not None

    def feed(self, data: bytes) -> bytes | None:
        """Returns the bytes after the body's end, or None until then.

        Raises:
            FramingError: its chunks are malformed.
            BodyTooLarge: it is longer than `server.max_body_bytes`; must not be fed any more.
        """
        end = self._body.feed(data)
        piece = data if end == MORE else data[:end]
        if self._stores_pieces:
            self.pieces.append(piece)
            if self._skimmer is not None:
                self._skimmer.feed(piece)
        self.count += 1
        self._body_bytes += len(piece)
        if not self._discards:
            self._limits.check_body_size(self._body_bytes)
        if len(self.pieces) - self._compacted > SMALL_PIECES_MAX and not self.pieces_frozen:
            self._compact()
        return None if end == MORE else data[end:]

    def _compact(self) -> None:
        """Joins many pieces into one: a body that comes byte by byte would take forty times its size."""
        self.pieces[self._compacted :] = [b"".join(self.pieces[self._compacted :])]
        self._compacted += 1

    def joined(self) -> bytes:
        body = b"".join(self.pieces)
        self.pieces[:] = [body]
        return body

    def release(self) -> None:
        """Frees the body, which is not needed any more."""
        self.pieces = []

    def model(self) -> str | None:
        """The model, if the body begins with it."""
        return None if self._skimmer is None else self._skimmer.model()

    def parse(self, path: str) -> ParsedBody:
        """Parses the complete body; if long, without its long strings.

        Raises:
            BadRequest: it has too many parts to be parsed within bounds.
        """
        text = None if self._skimmer is None else self._skimmer.text()
        if text is None or self._skimmer is None:
            return parse_body(self.joined(), path)
        parsed = parse_body_fast(text, path) or parse_body(text, path)
        return structs.replace(parsed, prompt_bytes=parsed.prompt_bytes + self._skimmer.text_bytes)


def is_worth_reading(head: RequestHead) -> bool:
    """Whether to read a refused request's body to its end; one that awaits `100 Continue` never comes."""
    return not head.chunked and (head.length or 0) <= UNREAD_BYTES_MAX and not head.expects_continue
