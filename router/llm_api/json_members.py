"""Finds the members of one JSON object by position, seeing exactly those that Go's encoding/json would see.

It refuses to interpret: values are spans of the given bytes, neither decoded nor changed, and what lies inside a nested
value is only skipped. Whatever Go accepts is found here; some of what Go refuses is found here too, which is harmless,
because a server gives it its own answer. Nothing recurses and the work is bounded, so no body can stall the caller.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import msgspec

TOKENS_MAX = 200_000
"""Members of the object plus brackets inside its values, for bodies that need the slow way; about 0.1 s of work."""

MEMBERS_MAX = 10_000
"""Members of the object, however it was read."""

DEPTH_MAX = 10_000
"""Nesting beyond which Go refuses (encoding/json/scanner.go, maxNestingDepth)."""

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


class Malformed(ValueError):
    """Not an object that Go would read."""


class TooComplex(ValueError):
    """Go might read it, but it has more parts than are looked at here."""


@dataclass(frozen=True, slots=True)
class Member:
    """One `"key": value`, with the positions of the key's first quote and of the value."""

    key: str
    start: int
    value_start: int
    value_end: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The members in the order of the bytes, duplicates included."""

    members: tuple[Member, ...]
    inside: int
    """Position after the opening brace."""


def scan(body: bytes) -> Scan:
    """The members of the object that is the first JSON value of `body`; bytes after it are ignored, as by Go.

    Raises:
        Malformed: Go would refuse the bytes too, or their first value is no object.
        TooComplex: more parts than are looked at.
    """
    return _scan_ordinary(body) or _Scanner(body).scan()


def text_of(literal: bytes) -> str:
    """The string of a valid JSON string literal as Go reads it.

    Each byte that is not UTF-8 and each surrogate without its other half becomes U+FFFD (encoding/json/decode.go,
    unquoteBytes).
    """
    if b"\\" not in literal and literal.isascii():
        return literal[1:-1].decode("ascii")
    text = _RAW_BYTES.sub(_REPLACEMENT, literal.decode("utf-8", "surrogateescape"))
    return _SURROGATES.sub(_REPLACEMENT, json.loads(text))


def _scan_ordinary(body: bytes) -> Scan | None:
    """The fast way, for objects without repeated or escaped keys; None where it cannot tell.

    The decoder keeps the last of equal keys. Each key and value that it found is therefore looked for at its place:
    if the bytes are used up without a gap, there was nothing else.
    """
    try:
        found = _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if len(found) > MEMBERS_MAX:
        raise TooComplex(f"the body has more than {MEMBERS_MAX} members")
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
        named = _PLAIN_KEY.match(body, position)
        value = bytes(raw)
        if named is None or named[1] != key.encode() or not body.startswith(value, named.end()):
            return None
        position = named.end() + len(value)
        members.append(Member(key, named.start(1) - 1, named.end(), position))
    return Scan(tuple(members), inside) if _END.fullmatch(body, position) else None


class _Scanner:
    """The slow way: everything that Go takes, however it is written."""

    __slots__ = ("_body", "_left")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._left = TOKENS_MAX

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
        self._spend()
        named = _KEY.match(self._body, position)
        if named is None:
            raise Malformed(f"expected a key at byte {position}")
        start = named.end()
        return Member(text_of(named[1]), position, start, self._skip(start))

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
            self._spend()
            bracket = _BRACKET.match(self._body, position)
            if bracket is None:
                raise Malformed("a list or object does not end")
            position = bracket.end()
            depth += 1 if self._body[position - 1] in b"[{" else -1
            if depth == 1:
                return position
            if depth > DEPTH_MAX:
                raise Malformed(f"nested deeper than {DEPTH_MAX}")

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TooComplex(f"the body has more than {TOKENS_MAX} members and brackets")
