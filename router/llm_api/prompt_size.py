"""Estimates how many bytes of a body the model reads as text. It never fails."""

from __future__ import annotations

import msgspec

from router.errors import UNREADABLE_JSON

EXACT_BYTES = 16_384
"""A shorter value can hardly contain an image, so the size of its JSON is used."""


class _Part(msgspec.Struct):
    """One part of a message's content; images under the names of the three APIs."""

    image_url: msgspec.Raw = msgspec.Raw(b"")
    source: msgspec.Raw = msgspec.Raw(b"")
    input_audio: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct):
    images: msgspec.Raw = msgspec.Raw(b"")
    content: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(list[_Message])
_PARTS = msgspec.json.Decoder(list[_Part])


def prompt_size(body: bytes, start: int, end: int) -> int:
    """Bytes of the JSON value from `start` to `end`, without images and audio in a list of messages."""
    size = end - start
    if size < EXACT_BYTES or not body.startswith(b"[", start):
        return size
    try:
        return size - sum(_media_bytes(message) for message in _DECODER.decode(memoryview(body)[start:end]))
    except UNREADABLE_JSON:
        return size


def _media_bytes(message: _Message) -> int:
    content = memoryview(message.content)
    parts = _PARTS.decode(content) if bytes(content[:1]) == b"[" else ()
    return _size(message.images) + sum(_size(p.image_url) + _size(p.source) + _size(p.input_audio) for p in parts)


def _size(raw: msgspec.Raw) -> int:
    return len(memoryview(raw))
