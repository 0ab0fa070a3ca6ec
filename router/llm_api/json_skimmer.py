"""Removes the long strings from a long JSON body while its pieces come.

Images make bodies long, and the members that routing reads are short. A string of more than `LONG_STRING_BYTES` is
replaced by a mark, so that a body of megabytes is parsed like one of a few hundred bytes, with the same members.
Strings are found by their quotes alone, which is correct for every body that a server accepts; for any other the result
does not matter, because the server rejects it. It gives up on bodies with many quotes, for which it would cost more
than parsing them whole, and on bodies of which much would stay, such as lists of numbers.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final, NamedTuple

from msgspec import structs

from router.llm_api.body_reader import ParsedBody, parse_body

LONG_STRING_BYTES: Final = 16384
"""Strings up to this length stay."""

QUOTES_MAX: Final = 4096

KEPT_BYTES_MAX: Final = 4 << 20
"""Of what is between strings, in the whole body."""

_MARK = b"~"
_BRACES = re.compile(rb"[{}]")
_OPEN = re.compile(rb"[ \t\r\n]*\{")
_PLAIN_MEMBER = re.compile(
    rb'[ \t\r\n]*+"([A-Za-z_]++)"[ \t\r\n]*+:[ \t\r\n]*+'
    rb'("[^"\\\x00-\x1f]*+"|[0-9.eE+a-z-]++|\{(?:[^{}\[\]"\\]++|"[^{}\[\]"\\]*+")*+\})[ \t\r\n]*+,'
)
"""With a value that is a plain string, a number, a word or a flat object, and the comma after it."""
_TEXTS: Final = tuple(
    b'"%s":%s"' % (key, blank) for key in (b"content", b"text", b"prompt", b"input") for blank in (b"", b" ")
)


class Beginning(NamedTuple):
    """What a body begins with, before the first member that is long or nested."""

    parsed: ParsedBody
    """As if there were no more than that, but a prompt. Later members may override it."""
    keep_alive: tuple[int, int] | None
    """Where the value of this member is in the body."""


class JsonSkimmer:
    """Feed it every piece in order; then call `text`."""

    __slots__ = (
        "_cut_bytes", "_cuts", "_depth", "_escapes_next", "_held", "_held_bytes", "_in_string", "_kept_bytes", "_parts",
        "_quotes_left", "_text_length", "may_have_ended", "text_bytes",
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
        self._text_length = 0
        self._cuts: list[int] = []
        """Where each mark ends in the text."""
        self._cut_bytes = [0]
        """By how much the text is shorter than the body before the first mark, after it, and so on."""
        self._depth = 0
        """Braces that are open."""
        self.may_have_ended = False
        """Whether the object's end has come, or it cannot be told."""

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

        self.may_have_ended = True

    def _keep(self, data: bytes) -> None:
        self._parts.append(data)
        self._kept_bytes += len(data)
        self._text_length += len(data)
        closes = data.count(b"}")
        if closes >= self._depth and closes:
            self._count_braces(data)
        else:
            self._depth += data.count(b"{") - closes
        if self._kept_bytes > KEPT_BYTES_MAX:
            self._quotes_left = 0
            self._parts.clear()

    def _count_braces(self, data: bytes) -> None:
        for brace in _BRACES.findall(data):
            self._depth += 1 if brace == b"{" else -1
            self.may_have_ended |= self._depth <= 0

    def text(self) -> bytes | None:
        """The body without its long strings; None if it gave up."""
        return b"".join(self._parts) if self._quotes_left > 0 else None

    def place(self, position: int) -> int:
        """Where in the body a position of the text is."""
        return position + self._cut_bytes[bisect_right(self._cuts, position)]

    def beginning(self, path: str) -> Beginning | None:
        """The first members of the body of a request to `path`; None if they do not say which model it is for."""
        text = b"".join(self._parts) if self._quotes_left > 0 else b""
        opened = _OPEN.match(text)
        end = opened.end() if opened is not None else 0
        keep_alive: tuple[int, int] | None = None
        while (member := _PLAIN_MEMBER.match(text, end)) is not None:
            end = member.end()
            if member[1] == b"keep_alive":
                keep_alive = (self.place(member.start(2)), self.place(member.end(2)))
        parsed = parse_body(text[: end - 1] + b"}", path) if end else None
        if parsed is None or not parsed.model or parsed.ambiguous:
            return None
        return Beginning(structs.replace(parsed, is_load_only=False, prompt_bytes=0), keep_alive)

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
            self._text_length += self._held_bytes
        else:
            if b"".join(self._parts[-4:]).endswith(_TEXTS):  # the key, its quotes, and the colon
                self.text_bytes += self._held_bytes
            self._parts.append(_MARK)
            self._text_length += len(_MARK)
            self._cuts.append(self._text_length)
            self._cut_bytes.append(self._cut_bytes[-1] + self._held_bytes - len(_MARK))
        self._parts.append(b'"')
        self._text_length += 1
        self._held = []
        self._held_bytes = 0
        self._in_string = False
        self._escapes_next = False
