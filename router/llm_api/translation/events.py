"""Server-sent events from pieces of a stream: the data of each event, however the bytes are split. Pure."""

from __future__ import annotations

EVENT_BYTES_MAX = 16 * 2**20
"""Of an event that is not complete."""


class EventTooLong(ValueError):
    """An event does not end."""


class EventReader:
    """`feed` returns the data of the events that a piece completes."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """
        Raises:
            EventTooLong: more than `EVENT_BYTES_MAX` without an end.
        """
        text = self._held + piece if self._held else piece
        if b"\r" in text:
            # A piece that ends between the two waits for the next.
            text, cut = (text[:-1], b"\r") if text.endswith(b"\r") else (text, b"")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            cut = b""
        *events, rest = text.split(b"\n\n")
        self._held = rest + cut
        if len(self._held) > EVENT_BYTES_MAX:
            raise EventTooLong(f"an event of the stream is longer than {EVENT_BYTES_MAX} bytes")
        return [data for event in events if (data := _data(event)) is not None]

    def rest(self) -> list[bytes]:
        """The data of an event that the end of the stream completes."""
        held, self._held = self._held.rstrip(b"\r\n"), b""
        data = _data(held.replace(b"\r\n", b"\n")) if held else None
        return [] if data is None else [data]


def _data(event: bytes) -> bytes | None:
    """The data of one event; None for a comment."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
