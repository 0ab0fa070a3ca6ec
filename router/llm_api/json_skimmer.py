"""Removes the long strings from a long JSON body while its pieces come.

Images make bodies long, and the members that routing reads are short. A string of more than `LONG_STRING_BYTES` is
replaced by a mark, so that a body of megabytes is parsed like one of a few hundred bytes, with the same members.
Strings are found by their quotes alone, which is correct for every body that a server accepts; for any other the result
does not matter, because the server rejects it. It gives up on bodies with many quotes, for which it would cost more
than parsing them whole, and on bodies of which much would stay, such as lists of numbers.
"""

from __future__ import annotations

import re
from typing import Final

LONG_STRING_BYTES: Final = 16384
"""Strings up to this length stay."""

QUOTES_MAX: Final = 4096

KEPT_BYTES_MAX: Final = 4 << 20
"""Of what is between strings, in the whole body."""

_MARK = b"~"
_FIRST_MODEL = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"model"[ \t\r\n]*:[ \t\r\n]*"([^"\\\x00-\x1f]+)"[ \t\r\n]*,')
_TEXTS: Final = tuple(
    b'"%s":%s"' % (key, blank) for key in (b"content", b"text", b"prompt", b"input") for blank in (b"", b" ")
)


class JsonSkimmer:
    """Feed it every piece in order; then call `text`."""

    __slots__ = (
        "_escapes_next", "_held", "_held_bytes", "_in_string", "_kept_bytes", "_parts", "_quotes_left", "text_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._kept_bytes = 0
        self._in_string = False
        self._held: list[bytes] = []
        """The current string, while it is not long."""
        self._held_bytes = 0
        self._escapes_next = False
        """Whether the current string ends in an odd number of backslashes: then a quote does not end it."""
        self._quotes_left = QUOTES_MAX
        self.text_bytes = 0
        """Removed bytes that are prompt text, judging by the key before them."""

    def feed(self, piece: bytes) -> None:
        position = 0
        while self._quotes_left > 0:
            quote = piece.find(b'"', position)
            if quote < 0:
                rest = piece[position:] if position else piece
                self._hold(rest) if self._in_string else self._keep(rest)
                return
            self._quotes_left -= 1
            if self._in_string:
                self._hold(piece[position:quote])
                if self._escapes_next:
                    self._hold(b'"')
                else:
                    self._end_string()
            else:
                self._keep(piece[position : quote + 1])
                self._in_string = True
            position = quote + 1

    def _keep(self, data: bytes) -> None:
        self._parts.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes > KEPT_BYTES_MAX:
            self._quotes_left = 0
            self._parts.clear()

    def text(self) -> bytes | None:
        """The body without its long strings; None if it gave up."""
        return b"".join(self._parts) if self._quotes_left > 0 else None

    def model(self) -> str | None:
        """The model, if it is the first member and plain. A later member may override it."""
        found = _FIRST_MODEL.match(b"".join(self._parts)) if self._quotes_left > 0 else None
        return None if found is None else found[1].decode(errors="replace")

    def _hold(self, data: bytes) -> None:
        if not data:
            return
        stripped = data.rstrip(b"\\")
        ends_odd = (len(data) - len(stripped)) % 2 == 1
        self._escapes_next = ends_odd != (self._escapes_next and not stripped)
        self._held_bytes += len(data)
        if self._held_bytes <= LONG_STRING_BYTES:
            self._held.append(data)
        else:
            self._held.clear()

    def _end_string(self) -> None:
        if self._held_bytes <= LONG_STRING_BYTES:
            self._parts += self._held
        else:
            if b"".join(self._parts[-4:]).endswith(_TEXTS):  # the key, its quotes, and the colon
                self.text_bytes += self._held_bytes
            self._parts.append(_MARK)
        self._parts.append(b'"')
        self._held = []
        self._held_bytes = 0
        self._in_string = False
        self._escapes_next = False
