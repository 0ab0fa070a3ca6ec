"""Changes one member of a JSON object and leaves every other byte of the body unchanged.

It never re-encodes: the server gets what the client wrote, including its spaces and number formats. A member that is
written more than once, in another letter case or with escapes, becomes one, because no parser of the changed body may
find another value than the one set here.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from router.llm_api.json_members import Member, Scan, fold, scan

KeyTest = Callable[[str], bool]


def set_member(body: bytes, name: str, value: bytes) -> bytes:
    """`body` with its top-level member `name` set to the JSON text `value`; appended if absent.

    `name` matches as a struct's field does in Go: case-insensitively. Of several, the last is kept.

    Raises:
        ValueError: `body` does not begin with a JSON object.
    """
    return _edited(body, lambda key: fold(key) == name, name, value)


def find_member(body: bytes, name: str) -> tuple[int, int] | None:
    """Where the value of the top-level member `name` is; None unless there is exactly one, written in that case."""
    try:
        found = [member for member in scan(body).members if fold(member.key) == name]
    except ValueError:
        return None
    if len(found) != 1 or not body.startswith(_quoted(name), found[0].start):
        return None
    return found[0].value_start, found[0].value_end


def set_nested(body: bytes, outer: str, name: str, value: bytes) -> bytes:
    """`body` with `name` set to the JSON text `value` in its member `outer`, which is created if absent or null.

    `outer` matches case-insensitively, `name` exactly: Go reads `outer` as a map, whose keys are case-sensitive.

    Raises:
        ValueError: `body` does not begin with a JSON object, or `outer` is neither an object nor null.
    """
    body, span = _with_one(body, outer)
    if span is None:
        return set_member(body, outer, b"{" + _quoted(name) + b":" + value + b"}")
    return spliced(body, span, _edited(body[slice(*span)], name.__eq__, name, value))


def remove_nested(body: bytes, outer: str, name: str) -> bytes:
    """`body` without `name` in its member `outer`; names match as in `set_nested`.

    Raises:
        ValueError: `body` does not begin with a JSON object, or `outer` is neither an object nor null.
    """
    body, span = _with_one(body, outer)
    if span is None:
        return body
    return spliced(body, span, _edited(body[slice(*span)], name.__eq__, name, None))


def spliced(body: bytes, span: tuple[int, int], replacement: bytes) -> bytes:
    """`body` with other bytes at `span`; nothing of a long body is copied but into the result."""
    view = memoryview(body)
    return b"".join((view[: span[0]], replacement, view[span[1] :]))


def _quoted(name: str) -> bytes:
    return json.dumps(name).encode()


def _edited(text: bytes, matches: KeyTest, name: str, value: bytes | None) -> bytes:
    """The object `text` with the last matching member set to `value`, or removed for None; other matches removed."""
    found = scan(text)
    hits = [index for index, member in enumerate(found.members) if matches(member.key)]
    kept = hits[-1] if hits and value is not None else None
    edits = _removals(found.members, {index for index in hits if index != kept})
    if value is not None:
        if kept is None:
            edits.append(_insertion(found.members, found.inside, name, value))
        else:
            edits.append(_replacement(text, found.members[kept], name, value))
    return _applied(text, edits)


Edit = tuple[int, int, bytes]
"""Start, end, and the replacement of the bytes between them."""


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


def _removals(members: tuple[Member, ...], removed: set[int]) -> list[Edit]:
    """Each with the comma before it, or the one after it if no member is left before it."""
    edits: list[Edit] = []
    has_predecessor = False
    for index, member in enumerate(members):
        if index not in removed:
            has_predecessor = True
        elif has_predecessor:
            edits.append((members[index - 1].value_end, member.value_end, b""))
        elif index + 1 < len(members):
            edits.append((member.start, members[index + 1].start, b""))
        else:
            edits.append((member.start, member.value_end, b""))
    return edits


def _applied(text: bytes, edits: list[Edit]) -> bytes:
    if not edits:
        return text
    view = memoryview(text)
    pieces: list[bytes | memoryview] = []
    position = 0
    for start, end, replacement in sorted(edits):
        pieces += (view[position:start], replacement)
        position = end
    pieces.append(view[position:])
    return b"".join(pieces)


def _outer(found: Scan, outer: str) -> list[Member]:
    return [member for member in found.members if fold(member.key) == outer]


def _with_one(body: bytes, outer: str) -> tuple[bytes, tuple[int, int] | None]:
    """`body` with at most one member `outer`, and where that object is; None if it is absent or null.

    Go merges repeated maps, and null empties them.
    """
    members = _outer(scan(body), outer)
    if len(members) > 1:
        body = _merged(body, outer, members)
        members = _outer(scan(body), outer)
    if not members or body[members[0].value_start : members[0].value_end] == b"null":
        return body, None
    return body, (members[0].value_start, members[0].value_end)


def _merged(body: bytes, outer: str, members: list[Member]) -> bytes:
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
