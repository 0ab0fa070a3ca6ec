"""Finds the members of one JSON object by position: exactly those that Go's encoding/json finds.

Values are spans of the given bytes, neither decoded nor changed, and nested values are only skipped. Whatever Go
accepts is found here; some of what Go rejects is found too, which is harmless, because the server responds to that
itself. Nothing recurses and the work is bounded, so no body can stall the caller.

Key folding: encoding/json/fold.go (Go 1.21 and later).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from router.errors import UNREADABLE_JSON

TOKENS_MAX = 200_000
"""Members of the object plus brackets inside its values, for bodies that need the slow scanner; about 0.1 s of work."""

MEMBERS_MAX = 10_000
"""Members of the object, with either scanner."""

DEPTH_MAX = 10_000
"""Nesting beyond which Go rejects (encoding/json/scanner.go, maxNestingDepth)."""

_STEP_BYTES = 1 << 20

_WS = rb"[ \t\n\r]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_NUMBER = rb"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+"

_OPEN = re.compile(_WS + rb"\{" + _WS)
_KEY = re.compile(rb"(" + _STRING + rb")" + _WS + rb":" + _WS)
_PLAIN_KEY = re.compile(_WS + rb'"([^"\\]*+)"' + _WS + rb":" + _WS)
_SCALAR = re.compile(_STRING + rb"|" + _NUMBER + rb"|true|false|null")
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+[\[\]{}]', re.DOTALL)
_AFTER = re.compile(_WS + rb"([,}])" + _WS)
_COMMA = re.compile(_WS + rb",")
_END = re.compile(_WS + rb"\}" + _WS)
_RAW_BYTES = re.compile("[\udc80-\udcff]")
_SURROGATES = re.compile("[\ud800-\udfff]")

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_REPLACEMENT = "\ufffd"
_FOLDS_TO_ASCII = str.maketrans({"\u017f": "s", "\u212a": "k"})
"""Long s and the Kelvin sign: the only runes beyond ASCII that fold to ASCII letters."""


class Malformed(ValueError):
    """Not an object that Go would accept."""


class TooComplex(ValueError):
    """Go might accept it, but it has more parts than this module scans."""


@dataclass(frozen=True, slots=True)
class Member:
    """One `"key": value`: the positions of the key's first quote and of the value."""

    key: str
    start: int
    value_start: int
    value_end: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The members in byte order, including duplicates."""

    members: tuple[Member, ...]
    inside: int
    """Position after the opening brace."""


def scan(body: bytes) -> Scan:
    """The members of the object that is the first JSON value of `body`; bytes after it are ignored, as in Go.

    Raises:
        Malformed: Go would reject the bytes too, or their first value is not an object.
        TooComplex: it has more parts than this module scans.
    """
    return _scan_ordinary(body) or _Scanner(body).scan()


def decode_members(body: bytes) -> dict[str, msgspec.Raw] | None:
    """The members by key, of equal keys the last, in one pass; None if it is no object that the C decoder accepts."""
    try:
        return _DECODER.decode(body)
    except UNREADABLE_JSON:
        return None


def blanks_of(body: bytes, members: dict[str, msgspec.Raw]) -> int | None:
    """The number of blanks after each colon and comma of `body`, 0 or 1, if it is written so; else None.

    A number proves that `members` are all there is, in this order, each key once and without escapes. Written without
    blanks, an object is as long as its members and the punctuation between them: there is no room for another byte.
    With blanks, as Python's `json` writes them, it is compared with the members written anew.
    """
    keys, count = "".join(members), len(members)
    spare = len(body) - sum(map(len, members.values())) - len(keys) - 4 * count - 1
    if not count or not keys.isascii():
        return None
    if not spare:
        return 0
    if spare != 2 * count - 1:
        return None
    written = b", ".join([b'"%b": %b' % (key.encode(), raw) for key, raw in members.items()])
    return 1 if body.startswith(written, 1) else None


def text_of(literal: bytes) -> str:
    """The string of a valid JSON string literal as Go reads it.

    Each invalid UTF-8 byte and each lone surrogate becomes U+FFFD (encoding/json/decode.go, unquoteBytes).
    """
    if b"\\" not in literal and literal.isascii():
        return literal[1:-1].decode("ascii")
    text = _RAW_BYTES.sub(_REPLACEMENT, literal.decode("utf-8", "surrogateescape"))
    return _SURROGATES.sub(_REPLACEMENT, json.loads(text))


def fold(key: str) -> str:
    """Folds a key as Go does, so that it equals the (lower-case) name of the field that Go would assign."""
    return key.lower() if key.isascii() else key.translate(_FOLDS_TO_ASCII).lower()


def _scan_ordinary(body: bytes) -> Scan | None:
    """The fast scanner, for objects without repeated or escaped keys; None if it cannot decide.

    The decoder keeps the last of equal keys. Therefore each key and value is compared with the bytes at its expected
    position, unless `blanks_of` says where they are: if they cover the object without a gap, there is nothing else.
    """
    found = decode_members(body)
    if found is None:
        return None
    if len(found) > MEMBERS_MAX:
        raise TooComplex(f"the body has more than {MEMBERS_MAX} members")
    blanks = blanks_of(body, found)
    if blanks is not None:
        return Scan(tuple(_placed(found, blanks)), 1)
    opened = _OPEN.match(body)
    if opened is None:
        return None
    inside = body.index(b"{") + 1
    position = inside
    members: list[Member] = []
    for key, raw in found.items():
        if members:
            comma = _COMMA.match(body, position)
            if comma is None:
                return None
            position = comma.end()
        key_match = _PLAIN_KEY.match(body, position)
        value = memoryview(raw)
        if key_match is None or key_match[1] != key.encode() or not _is_at(body, value, key_match.end()):
            return None
        position = key_match.end() + len(value)
        members.append(Member(key, key_match.start(1) - 1, key_match.end(), position))
    return Scan(tuple(members), inside) if _END.fullmatch(body, position) else None


def _placed(members: dict[str, msgspec.Raw], blanks: int) -> Iterator[Member]:
    """The members with their positions, after `blanks_of`."""
    start = 1
    for key, raw in members.items():
        value_start = start + len(key) + 3 + blanks
        yield Member(key, start, value_start, value_start + len(raw))
        start = value_start + len(raw) + 1 + blanks


def _is_at(body: bytes, value: memoryview, position: int) -> bool:
    """Whether `value` is in `body` at that position. Compares in steps, so that a long value is not copied whole."""
    return all(
        body.startswith(bytes(value[start : start + _STEP_BYTES]), position + start)
        for start in range(0, len(value), _STEP_BYTES)
    )


class _Scanner:
    """The slow scanner: everything that Go accepts, however it is written."""

    __slots__ = ("_body", "_tokens_left")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._tokens_left = TOKENS_MAX

    def scan(self) -> Scan:
        opened = _OPEN.match(self._body)
        if opened is None:
            raise Malformed("not a JSON object")
        inside = self._body.index(b"{") + 1
        if self._body.startswith(b"}", opened.end()):
            return Scan((), inside)
        return Scan(tuple(self._members(opened.end())), inside)

    def _members(self, position: int) -> list[Member]:
        members: list[Member] = []
        while True:
            member = self._member(position)
            members.append(member)
            after = _AFTER.match(self._body, member.value_end)
            if after is None:
                raise Malformed(f"expected a comma or the end of the object at byte {member.value_end}")
            if after[1] == b"}":
                return members
            position = after.end()

    def _member(self, position: int) -> Member:
        self._count_token()
        key_match = _KEY.match(self._body, position)
        if key_match is None:
            raise Malformed(f"expected a key at byte {position}")
        start = key_match.end()
        return Member(text_of(key_match[1]), position, start, self._skip(start))

    def _skip(self, position: int) -> int:
        """The end of the value that starts at `position`."""
        if self._body[position : position + 1] in (b"{", b"["):
            return self._skip_container(position)
        scalar = _SCALAR.match(self._body, position)
        if scalar is None:
            raise Malformed(f"expected a value at byte {position}")
        return scalar.end()

    def _skip_container(self, position: int) -> int:
        depth = 1  # the object around it
        while True:
            self._count_token()
            bracket = _BRACKET.match(self._body, position)
            if bracket is None:
                raise Malformed("an unterminated list or object")
            position = bracket.end()
            depth += 1 if self._body[position - 1] in b"[{" else -1
            if depth == 1:
                return position
            if depth > DEPTH_MAX:
                raise Malformed(f"nested deeper than {DEPTH_MAX}")

    def _count_token(self) -> None:
        self._tokens_left -= 1
        if self._tokens_left < 0:
            raise TooComplex(f"the body has more than {TOKENS_MAX} members and brackets")
