"""The last bytes of an answer, kept while it passes, at next to no cost a piece.

The last few pieces are kept, of a large one only its end. Nothing is parsed here.
"""

from __future__ import annotations

from collections import deque

from router.gateway.endings import TAIL_BYTES

PIECES = 16
"""So many are kept: the last line of an answer comes in one or two, and the end of the chunks after it."""


class Tail(deque[bytes]):
    """`append` each piece, cut by the caller to its last `TAIL_BYTES`; `read` gives the end of what came."""

    def __init__(self) -> None:
        super().__init__(maxlen=PIECES)

    def read(self) -> bytes:
        return b"".join(self)[-TAIL_BYTES:]
