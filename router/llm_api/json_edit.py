"""Changes one member of a JSON object and leaves every other byte of the body as it was.

It refuses to re-encode: what a client wrote, down to its blanks and the way its numbers are spelt, is what the server
gets. A member that is written more than once, in other letter case or with escapes, is made one, because whoever reads
the changed body next must not be able to see another value than the one set here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from router.llm_api.json_members import Member, scan
from router.llm_api.key_folding import fold

Named = Callable[[str], bool]

_PLAIN = re.compile(rb'[ \t\n\r]*:[ \t\n\r]*("[^"\\]*"|-?[0-9][0-9.eE+-]*)')
"""A member's value, from behind its name."""


def set_member(body: bytes, name: str, value: bytes) -> bytes:
    """`body` with its top-level member `name` set to the JSON text `value`; appended where there is none.

    `name` is matched as Go matches a struct's field: without regard to case. Of several, the last is kept.

    Raises:
        ValueError: `body` does not begin with a JSON object.
    """
    return _edited(body, _like(name), name, value)


def set_only(body: bytes, name: str, value: bytes) -> bytes:
    """What `set_member` gives, for a body that is known to have one member on its top level that Go takes for `name`,
    written in that case; then most bodies need not be gone through.

    Raises:
        ValueError: `body` does not begin with a JSON object.
    """
    quoted = _quoted(name)
    if b"\\u00" in body or body.count(quoted) != 1:
        return set_member(body, name, value)
    found = _PLAIN.match(body, body.index(quoted) + len(quoted))
    return body[: found.start(1)] + value + body[found.end(1) :] if found else set_member(body, name, value)


def remove_member(body: bytes, name: str) -> bytes:
    """`body` without its top-level member `name`, in whatever case and however often it is written.

    Raises:
        ValueError: `body` does not begin with a JSON object.
    """
    return _edited(body, _like(name), name, None)


def set_nested(body: bytes, outer: str, name: str, value: bytes) -> bytes:
    """`body` with `name` set to the JSON text `value` in its member `outer`, which is made where it is absent or null.

    `outer` is matched without regard to case, `name` exactly: Go reads `outer` as a map, whose keys keep their case.

    Raises:
        ValueError: `body` does not begin with a JSON object, or `outer` is neither an object nor null.
    """
    body = _with_one(body, outer)
    span = _span(body, outer)
    if span is None:
        return set_member(body, outer, b"{" + _quoted(name) + b":" + value + b"}")
    start, end = span
    return body[:start] + _edited(body[start:end], name.__eq__, name, value) + body[end:]


def remove_nested(body: bytes, outer: str, name: str) -> bytes:
    """`body` without `name` in its member `outer`; names as for `set_nested`.

    Raises:
        ValueError: `body` does not begin with a JSON object, or `outer` is neither an object nor null.
    """
    body = _with_one(body, outer)
    span = _span(body, outer)
    if span is None:
        return body
    start, end = span
    return body[:start] + _edited(body[start:end], name.__eq__, name, None) + body[end:]


def _like(name: str) -> Named:
    return lambda key: fold(key) == name


def _quoted(name: str) -> bytes:
    return json.dumps(name).encode()


def _edited(text: bytes, named: Named, name: str, value: bytes | None) -> bytes:
    """The object `text` with the last member that is `named` set to `value`, or removed for None; others removed."""
    found = scan(text)
    hits = [index for index, member in enumerate(found.members) if named(member.key)]
    kept = hits[-1] if hits and value is not None else None
    edits = _removals(found.members, {index for index in hits if index != kept})
    if value is not None:
        if kept is None:
            edits.append(_insertion(found.members, found.inside, name, value))
        else:
            edits.append(_replacement(text, found.members[kept], name, value))
    return _applied(text, edits)


Edit = tuple[int, int, bytes]
"""From, to, and what stands there instead."""


def _insertion(members: tuple[Member, ...], inside: int, name: str, value: bytes) -> Edit:
    member = _quoted(name) + b":" + value
    if not members:
        return inside, inside, member
    end = members[-1].value_end
    return end, end, b"," + member


def _replacement(text: bytes, member: Member, name: str, value: bytes) -> Edit:
    quoted = _quoted(name)
    if text.startswith(quoted, member.start):
        return member.value_start, member.value_end, value
    return member.start, member.value_end, quoted + b":" + value


def _removals(members: tuple[Member, ...], gone: set[int]) -> list[Edit]:
    """Each with the comma before it, or the one after it where no member is left before it."""
    edits: list[Edit] = []
    led = False
    for index, member in enumerate(members):
        if index not in gone:
            led = True
        elif led:
            edits.append((members[index - 1].value_end, member.value_end, b""))
        elif index + 1 < len(members):
            edits.append((member.start, members[index + 1].start, b""))
        else:
            edits.append((member.start, member.value_end, b""))
    return edits


def _applied(text: bytes, edits: list[Edit]) -> bytes:
    if not edits:
        return text
    pieces: list[bytes] = []
    position = 0
    for start, end, replacement in sorted(edits):
        pieces += (text[position:start], replacement)
        position = end
    pieces.append(text[position:])
    return b"".join(pieces)


def _values(body: bytes, outer: str) -> list[Member]:
    return [member for member in scan(body).members if fold(member.key) == outer]


def _span(body: bytes, outer: str) -> tuple[int, int] | None:
    """Where the object `outer` stands, once there is at most one; None where it is absent or null."""
    members = _values(body, outer)
    if not members or body[members[0].value_start : members[0].value_end] == b"null":
        return None
    return members[0].value_start, members[0].value_end


def _with_one(body: bytes, outer: str) -> bytes:
    """`body` with at most one member `outer`: Go merges maps that are given more than once, and null empties them."""
    members = _values(body, outer)
    if len(members) < 2:
        return body
    merged: dict[str, bytes] | None = None
    for member in members:
        value = body[member.value_start : member.value_end]
        if value == b"null":
            merged = None
            continue
        inner = {item.key: value[item.value_start : item.value_end] for item in scan(value).members}
        merged = {**(merged or {}), **inner}
    if merged is None:
        return set_member(body, outer, b"null")
    texts = (_quoted(key) + b":" + value for key, value in merged.items())
    return set_member(body, outer, b"{" + b",".join(texts) + b"}")
