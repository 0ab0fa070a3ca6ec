"""Finds and replaces the model in a multipart form, as `/v1/audio/*` takes it, without touching other parts.

Parsed as Go's mime/multipart does: parts are separated by lines of the boundary that Content-Type names, anything
before the first is skipped, and the first part of a name counts. A part with a file name is a file, not a field. A form
that cannot be parsed is for the server to reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
_NAME = re.compile(rb'\bname=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE)
_FILE = re.compile(rb"\bfilename\*?=", re.IGNORECASE)
_HEAD_BYTES_MAX = 16384


@dataclass(frozen=True, slots=True)
class Field:
    """The position of a field's value in the body."""

    start: int
    end: int


def is_form(path: str, content_type: str | None) -> bool:
    """Whether a server reads the body of a POST to this path as a form. Everywhere else it reads JSON, whatever the
    header says (server/routes.go, v0.34.0; `/v1/images/edits` too, v0.24.0)."""
    return path.startswith("/v1/audio/") and (content_type or "").strip().lower().startswith("multipart/form-data")


def find_field(body: bytes, content_type: str, name: str) -> Field | None:
    """The first field of that name; None if there is none, or the form cannot be parsed."""
    return next(find_fields(body, content_type, name), None)


def find_fields(body: bytes, content_type: str, name: str) -> Iterator[Field]:
    """All fields of that name, of which a server takes the first."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        return
    delimiter = b"--" + (boundary[1] or boundary[2]).encode("latin-1", "replace")
    for start, end in _parts(body, delimiter):
        split = body.find(b"\r\n\r\n", start, min(end, start + _HEAD_BYTES_MAX))
        if split >= 0 and _is_field(body[start:split], name):
            yield Field(split + 4, end)


def replaced(body: bytes, field: Field, value: str) -> bytes:
    """`body` with `value` in that field."""
    return body[: field.start] + value.encode() + body[field.end :]


def _parts(body: bytes, delimiter: bytes) -> list[tuple[int, int]]:
    """For each part the start of its headers and the end of its value."""
    position = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if position < 2 and not body.startswith(delimiter):
        return []
    parts: list[tuple[int, int]] = []
    while True:
        start = position + len(delimiter)
        if not body.startswith(b"\r\n", start):  # the last delimiter ends in two dashes
            return parts
        end = body.find(b"\r\n" + delimiter, start)
        if end < 0:
            return parts
        parts.append((start + 2, end))
        position = end + 2


def _is_field(head: bytes, name: str) -> bool:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            found = _NAME.search(value)
            return (
                found is not None
                and (found[1] if found[1] is not None else found[2]) == name.encode()
                and not _FILE.search(value)
            )
    return False
