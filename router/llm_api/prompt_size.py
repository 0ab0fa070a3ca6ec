"""How many bytes of a body the model will read as text. A hint for estimates; it never fails and decides nothing."""

from __future__ import annotations

import msgspec

EXACT_BYTES = 16_384
"""Below this an image can hardly be in it, and the size of the JSON is taken as it is."""


class _Part(msgspec.Struct):
    """One part of a message's content; its images under the names that the three APIs use."""

    image_url: msgspec.Raw = msgspec.Raw(b"")
    source: msgspec.Raw = msgspec.Raw(b"")
    input_audio: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct):
    images: msgspec.Raw = msgspec.Raw(b"")
    content: str | list[_Part] | None = None


_DECODER = msgspec.json.Decoder(list[_Message])


def prompt_size(body: bytes, start: int, end: int) -> int:
    """Bytes of the JSON value at `start` to `end`, without the images and sound in a list of messages."""
    size = end - start
    if size < EXACT_BYTES or not body.startswith(b"[", start):
        return size
    try:
        messages = _DECODER.decode(memoryview(body)[start:end])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return size
    return size - sum(_unread(message) for message in messages)


def _unread(message: _Message) -> int:
    parts = message.content if isinstance(message.content, list) else ()
    return _size(message.images) + sum(_size(p.image_url) + _size(p.source) + _size(p.input_audio) for p in parts)


def _size(raw: msgspec.Raw) -> int:
    return len(memoryview(raw))
