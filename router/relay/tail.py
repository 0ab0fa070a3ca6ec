"""The last bytes of an answer, kept while it passes, at next to no cost a piece.

Small pieces are kept in a list that is cut now and then; a large one replaces it. Nothing is parsed here.
"""

from __future__ import annotations

from router.gateway.endings import TAIL_BYTES

_PIECES_MAX = 24


class Tail:
    """`add` each piece; `read` gives at least the last `TAIL_BYTES` of them, where there were so many."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        pieces = self._pieces
        if len(piece) >= TAIL_BYTES:
            self._pieces = [piece[-TAIL_BYTES:]]
            return
        pieces.append(piece)
        if len(pieces) > _PIECES_MAX:
            self._pieces = [b"".join(pieces)[-TAIL_BYTES:]]

    def read(self) -> bytes:
        return b"".join(self._pieces)[-TAIL_BYTES:]
