"""Where an HTTP/1.1 message's body ends, exactly, whatever pieces its bytes come in.

Each kind of body is a small machine with one method, `feed(data, start)`: it looks at `data` from `start` on and
returns the index of the first byte that is not the message's any more, or `MORE` while the message goes on. It keeps no
copy of the body and changes no byte: a relay passes on what came. `Chunked` can also hand out the payload, for
receivers that know no chunks.

Strictness (RFC 9112, 7.1): lines end in CRLF, sizes are plain hexadecimal, chunk data is followed by CRLF; whatever is
not so is an error and never guessed at, because two readers that guess differently is how requests are smuggled.
Heads are not parsed here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Protocol

MORE: Final = -1
"""The message goes on after these bytes."""

LINE_BYTES_MAX: Final = 4096
"""Longest chunk-size line, extensions included, and longest trailer line."""

TRAILER_BYTES_MAX: Final = 16384
"""All trailer lines together."""

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\x00]*)?\r\n")
_FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\x00]*\r\n")
_CRLF: Final = b"\r\n"


_RUN: Final = 8
"""From so many chunks in one piece on, those alike are passed over at once."""

_RUN_STEP_MAX: Final = 4096


@lru_cache(maxsize=256)
def _alike(line: bytes, length: int) -> re.Pattern[bytes]:
    return re.compile(rb"(?:%b(?s:.){%d}\r\n)++" % (re.escape(line), length))


class FramingError(ValueError):
    """The bytes are no well-formed body: where it ends cannot be known."""


class Body(Protocol):
    """A body whose end is looked for."""

    chunks: int
    """Chunks with data in them that were seen to begin; 0 for bodies that have none."""

    def feed(self, data: bytes, start: int = 0) -> int:
        """The index in `data` after the message's last byte, or `MORE`; not to be called after that.

        Raises:
            FramingError: malformed.
        """
        ...

    def closed(self) -> bool:
        """Whether the message is whole if the connection ends now."""
        ...


class NoBody:
    """A message without a body: it ends where its head ends."""

    __slots__ = ("chunks",)

    def __init__(self) -> None:
        self.chunks = 0

    def feed(self, data: bytes, start: int = 0) -> int:
        del data
        return start

    def closed(self) -> bool:
        return True


class UntilClose:
    """A body that lasts until its sender closes the connection: only of a reply."""

    __slots__ = ("chunks",)

    def __init__(self) -> None:
        self.chunks = 0

    def feed(self, data: bytes, start: int = 0) -> int:
        del data, start
        return MORE

    def closed(self) -> bool:
        return True


class Sized:
    """A body of Content-Length bytes."""

    __slots__ = ("chunks", "left_bytes")

    def __init__(self, length_bytes: int) -> None:
        self.chunks = 0
        self.left_bytes = length_bytes

    def feed(self, data: bytes, start: int = 0) -> int:
        here = len(data) - start
        if here < self.left_bytes:
            self.left_bytes -= here
            return MORE
        end = start + self.left_bytes
        self.left_bytes = 0
        return end

    def closed(self) -> bool:
        return self.left_bytes == 0


class Chunked:
    """A body in chunks, with extensions and trailers.

    Between two pieces it is in one of four places: inside chunk data (`_left` > 0 counts what of it and of its CRLF is
    still to come), in a size line, in the trailers, or at the end. A line that a piece cuts in two is held (at most
    `LINE_BYTES_MAX`) and looked at again with the next piece. A chunk header like the one before it, as every token of
    a stream has, is recognised by comparing bytes.
    """

    __slots__ = ("_held", "_in_trailers", "_left", "_line", "_step", "_trailer_bytes", "chunks", "payload")

    def __init__(self, payload: list[bytes] | None = None) -> None:
        self.chunks = 0
        self.payload = payload
        """Where it is a list, data is appended to it without its framing."""
        self._left = 0
        self._held = b""
        self._in_trailers = False
        self._trailer_bytes = 0
        self._line = b"\xff"  # no header begins so
        self._step = 0

    def closed(self) -> bool:
        return False

    @property
    def at_boundary(self) -> bool:
        """Whether a whole chunk of our own could stand here."""
        return self._left == 0 and not self._held and not self._in_trailers

    def feed(self, data: bytes, start: int = 0) -> int:
        if len(data) == self._step and not start and self._is_alike(data):
            self.chunks += 1
            return MORE
        held = len(self._held)
        if held:
            data = self._held + data[start:]
            self._held = b""
            end = self._scan(data, 0)
            return end if end == MORE else end - held + start
        return self._scan(data, start)

    def _is_alike(self, data: bytes) -> bool:
        """The way of almost every token: one whole chunk, as large as the one before it."""
        between = not (self._left or self._held or self._in_trailers) and self.payload is None
        return between and data.startswith(self._line) and data.endswith(_CRLF)

    def _scan(self, data: bytes, position: int) -> int:
        size = len(data)
        if self._left:
            position = self._skip(data, position, size)
        line, step = self._line, self._step
        while position < size:
            if self._in_trailers:
                return self._trailers(data, position, size)
            if data.startswith(line, position):
                if size - position > _RUN * step and self.payload is None and step < _RUN_STEP_MAX:
                    position = self._run(data, position)
                    continue
                end = position + step
                if end <= size and data.startswith(_CRLF, end - 2):
                    if self.payload is not None:
                        self.payload.append(data[position + len(line) : end - 2])
                    self.chunks += 1
                    position = end
                    continue
            position = self._header(data, position, size)
            line, step = self._line, self._step
        return MORE

    def _run(self, data: bytes, position: int) -> int:
        """Passes over chunks that are all alike, of which at least the first is whole; the position after them."""
        line, step = self._line, self._step
        found = _alike(line, step - len(line) - 2).match(data, position)
        if found is None:
            raise FramingError("chunk data does not end in CRLF")
        self.chunks += (found.end() - position) // step
        return found.end()

    def _header(self, data: bytes, position: int, size: int) -> int:
        """Reads a size line and as much of its chunk as there is; the position after that."""
        found = _SIZE.match(data, position)
        if found is None:
            self._hold(data, position)
            return size
        length = int(found[1], 16)
        begin = found.end()
        if length == 0:
            self._in_trailers = True
            return begin
        self.chunks += 1
        end = begin + length + 2
        self._line, self._step = found[0], end - position
        if end <= size and self.payload is None and data.startswith(_CRLF, end - 2):
            return end
        self._left = length + 2
        return self._skip(data, begin, size)

    def _skip(self, data: bytes, position: int, size: int) -> int:
        """Passes over chunk data and the CRLF after it."""
        here = size - position
        left = self._left
        taken = here if here < left else left
        end = position + taken
        data_end = end if taken <= left - 2 else position + left - 2
        if self.payload is not None and data_end > position:
            self.payload.append(data[position:data_end])
        # Of the CRLF only what has come can be compared: `expected` is the part of it that lies in this piece.
        if taken > left - 2:
            first = max(position, data_end)
            expected = _CRLF[2 - min(left, 2) :][: end - first]
            if data[first:end] != expected:
                raise FramingError("chunk data does not end in CRLF")
        self._left = left - taken
        return end

    def _trailers(self, data: bytes, position: int, size: int) -> int:
        while position < size:
            if data.startswith(_CRLF, position):
                return position + 2
            found = _FIELD.match(data, position)
            if found is None:
                self._hold(data, position)
                return MORE
            self._trailer_bytes += found.end() - position
            if self._trailer_bytes > TRAILER_BYTES_MAX:
                raise FramingError("the trailers are too long")
            position = found.end()
        return MORE

    def _hold(self, data: bytes, position: int) -> None:
        """Keeps the beginning of a line for the next piece, unless it can no longer become a valid one."""
        rest = data[position:]
        newline = rest.find(b"\n")
        if newline >= 0 or len(rest) > LINE_BYTES_MAX or not self._may_begin_line(rest):
            raise FramingError("a malformed chunk size" if not self._in_trailers else "a malformed trailer")
        self._held = rest

    def _may_begin_line(self, rest: bytes) -> bool:
        """Whether `rest`, which has no line feed in it, may be the beginning of a valid line."""
        if rest == b"\r":
            return self._in_trailers
        whole = rest if rest.endswith(b"\r") else rest + b"\r"
        if self._in_trailers:
            name_only = b":" not in rest and not rest.endswith(b"\r")
            return _FIELD.fullmatch((rest + b":\r\n") if name_only else whole + b"\n") is not None
        if rest.rstrip(b" \t") != rest:
            whole = rest + b";\r"
        return _SIZE.fullmatch(whole + b"\n") is not None
