"""The JSON of a long body without the long strings in it, found while its pieces come.

Images make bodies long, and what routing reads of them is short. A string of more than `LONG_BYTES` is taken out and a
mark left in its place, so that a body of megabytes is read like one of a few hundred bytes; what is left is the same
object to whoever looks for its members. Strings are found by their quotes alone, which is right for every body that a
server takes; of any other it does not matter what is seen, because the server refuses it. It gives up on bodies with
many quotes, for which it would cost more than reading them whole.
"""

from __future__ import annotations

import re
from typing import Final

LONG_BYTES: Final = 16384
"""Shorter strings stay as they are."""

QUOTES_MAX: Final = 4096

_MARK = b"~"
_FIRST_MODEL = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"model"[ \t\r\n]*:[ \t\r\n]*"([^"\\\x00-\x1f]+)"[ \t\r\n]*,')
_TEXTS: Final = tuple(
    b'"%s":%s"' % (key, blank) for key in (b"content", b"text", b"prompt", b"input") for blank in (b"", b" ")
)


class JsonSkimmer:
    """Feed it every piece in order; then see `text`."""

    __slots__ = ("_held", "_held_bytes", "_in_string", "_left", "_odd", "_parts", "text_bytes")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._in_string = False
        self._held: list[bytes] = []
        """The string so far, while it is not long."""
        self._held_bytes = 0
        self._odd = False
        """Whether the string so far ends in an odd number of backslashes: then a quote does not end it."""
        self._left = QUOTES_MAX
        self.text_bytes = 0
        """How much of what was taken out is text that a model reads, as far as the key before it tells."""

    def feed(self, piece: bytes) -> None:
        position = 0
        while self._left > 0:
            quote = piece.find(b'"', position)
            if quote < 0:
                rest = piece[position:] if position else piece
                self._hold(rest) if self._in_string else self._parts.append(rest)
                return
            self._left -= 1
            if self._in_string:
                self._hold(piece[position:quote])
                if self._odd:
                    self._hold(b'"')
                else:
                    self._end_string()
            else:
                self._parts.append(piece[position : quote + 1])
                self._in_string = True
            position = quote + 1

    def text(self) -> bytes | None:
        """The body without its long strings; None where it was given up."""
        return b"".join(self._parts) if self._left > 0 else None

    def model(self) -> str | None:
        """The model, where it is the first member and plain. It is what a later member may say otherwise."""
        found = _FIRST_MODEL.match(b"".join(self._parts)) if self._left > 0 else None
        return None if found is None else found[1].decode(errors="replace")

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        bare = data.rstrip(b"\\")
        slashes = (len(data) - len(bare)) % 2 == 1
        self._odd = slashes != (self._odd and not bare)
        self._held_bytes += len(data)
        if self._held_bytes <= LONG_BYTES:
            self._held.append(data)
        else:
            self._held.clear()

    def _end_string(self) -> None:
        if self._held_bytes <= LONG_BYTES:
            self._parts += self._held
        else:
            if b"".join(self._parts[-4:]).endswith(_TEXTS):  # the key, its quotes, and the colon
                self.text_bytes += self._held_bytes
            self._parts.append(_MARK)
        self._parts.append(b'"')
        self._held = []
        self._held_bytes = 0
        self._in_string = False
        self._odd = False
