"""Finds the exact end of an HTTP/1.1 message body, however its bytes are split into pieces.

Each kind of body is a small state machine with one method, `feed(data, start)`: it scans `data` from `start` on and
returns the index of the first byte after the message, or `MORE` until then. It neither copies nor changes the body: a
relay forwards the bytes as they came. `Chunked` can also collect the payload, for receivers that do not support chunks.

Strictness (RFC 9112, 7.1): lines end in CRLF, sizes are plain hexadecimal, chunk data is followed by CRLF. Anything
else is an error and never guessed at: parsers that guess differently are how requests are smuggled.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Protocol

MORE: Final = -1
"""The message continues after these bytes."""

LINE_BYTES_MAX: Final = 4096
"""A chunk-size line, including extensions and CRLF, and an incomplete trailer line are shorter, as in Go."""

TRAILER_BYTES_MAX: Final = 16384
"""All trailer lines together."""

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\x00]*)?\r\n")
_FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\x00]*\r\n")
_CRLF: Final = b"\r\n"


_RUN_BYTES_MIN: Final = 2048
"""Of a piece of this length whole chunks are skipped together."""
_PLAIN_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


@lru_cache(maxsize=1024)
def _length_of(size: bytes) -> int:
    """The length that a chunk's plain size says; -1 for anything else, and for the last chunk."""
    return (int(size, 16) or -1) if _PLAIN_SIZE.fullmatch(size) else -1


class FramingError(ValueError):
    """The body is malformed: its end cannot be determined."""


class Body(Protocol):
    """A body whose end is to be found."""

    chunks: int
    """Non-empty chunks begun so far; 0 for other kinds of body."""

    def feed(self, data: bytes, start: int = 0) -> int:
        """Returns the index in `data` after the message's last byte, or `MORE`. Must not be called after the end.

        Raises:
            FramingError: malformed.
        """
        ...

    def closed(self) -> bool:
        """Whether the message is complete if the connection closes now."""
        ...


class NoBody:
    """No body: the message ends with its head."""

    __slots__ = ("chunks",)

    def __init__(self) -> None:
        self.chunks = 0

    def feed(self, data: bytes, start: int = 0) -> int:
        del data
        return start

    def closed(self) -> bool:
        return True


class UntilClose:
    """A reply body that ends when the sender closes the connection."""

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

    Between two pieces it is in one of four states: inside chunk data (`_left` > 0 counts the bytes of it and of its
    CRLF still to come), in a size line, in the trailers, or at the end. An incomplete line is held (at most
    `LINE_BYTES_MAX`) and scanned again with the next piece. A size line equal to the one before it, as with many tokens
    of a stream, is recognised by comparing bytes.
    """

    __slots__ = ("_held", "_in_trailers", "_left", "_line", "_step", "_trailer_bytes", "chunks", "payload")

    def __init__(self, payload: list[bytes] | None = None) -> None:
        self.chunks = 0
        self.payload = payload
        """If a list, chunk data is appended to it without framing."""
        self._left = 0
        self._held = b""
        self._in_trailers = False
        self._trailer_bytes = 0
        self._line = b""
        self._step = 0
        """Bytes of the chunk before; 0 before the first."""

    def closed(self) -> bool:
        return False

    @property
    def at_boundary(self) -> bool:
        """Whether a whole chunk could be inserted here."""
        return self._left == 0 and not self._held and not self._in_trailers

    def feed(self, data: bytes, start: int = 0) -> int:
        if len(data) == self._step and not start and self._is_equal_chunk(data):
            self.chunks += 1
            return MORE
        held = len(self._held)
        if held:
            data = self._held + data[start:]
            self._held = b""
            end = self._scan(data, 0)
            return end if end == MORE else end - held + start
        return self._scan(data, start)

    def _is_equal_chunk(self, data: bytes) -> bool:
        """The common case of a token: one whole chunk of the same size as the one before."""
        between = not (self._left or self._held or self._in_trailers or not data) and self.payload is None
        return between and data.startswith(self._line) and data.endswith(_CRLF)

    def _scan(self, data: bytes, position: int) -> int:
        size = len(data)
        if self._left:
            position = self._skip(data, position, size)
        if size - position >= _RUN_BYTES_MIN and self.payload is None and not self._in_trailers:
            position = self._run(data, position)
        line, step = self._line, self._step
        while position < size:
            if self._in_trailers:
                return self._trailers(data, position, size)
            if step and data.startswith(line, position):
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
        """Skips whole chunks whose data has no CRLF, up to the first other one; returns the position after them.

        If each line after a size is as long as that says, sizes and data alternate, and no byte need be looked at.
        """
        lines = (data[position:] if position else data).split(_CRLF)
        count = (len(lines) - 1) // 2
        sizes, lengths = lines[: 2 * count : 2], [*map(len, lines[1 : 2 * count : 2])]
        if [*map(_length_of, sizes)] != lengths:
            pairs = enumerate(zip(sizes, lengths, strict=True))
            count = next(index for index, (size, length) in pairs if _length_of(size) != length)
        self.chunks += count
        return position + sum(map(len, sizes[:count])) + sum(lengths[:count]) + 4 * count

    def _header(self, data: bytes, position: int, size: int) -> int:
        """Reads a size line and the available part of its chunk; returns the position after that."""
        found = _SIZE.match(data, position)
        if found is None:
            self._hold(data, position)
            return size
        length = int(found[1], 16)
        begin = found.end()
        if begin - position >= LINE_BYTES_MAX:
            raise FramingError("a malformed chunk size")
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
        """Skips chunk data and the CRLF after it."""
        here = size - position
        left = self._left
        taken = here if here < left else left
        end = position + taken
        data_end = end if taken <= left - 2 else position + left - 2
        if self.payload is not None and data_end > position:
            self.payload.append(data[position:data_end])
        # `expected` is the part of the CRLF that lies in this piece.
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
        """Keeps the beginning of a line for the next piece, unless it can no longer become a valid line."""
        rest = data[position:]
        newline = rest.find(b"\n")
        if newline >= 0 or len(rest) > LINE_BYTES_MAX or not self._may_begin_line(rest):
            raise FramingError("a malformed chunk size" if not self._in_trailers else "a malformed trailer")
        self._held = rest

    def _may_begin_line(self, rest: bytes) -> bool:
        """Whether `rest`, which contains no line feed, may begin a valid line."""
        if rest == b"\r":
            return self._in_trailers
        whole = rest if rest.endswith(b"\r") else rest + b"\r"
        if self._in_trailers:
            name_only = b":" not in rest and not rest.endswith(b"\r")
            return _FIELD.fullmatch((rest + b":\r\n") if name_only else whole + b"\n") is not None
        if rest.rstrip(b" \t") != rest:
            whole = rest + b";\r"
        return _SIZE.fullmatch(whole + b"\n") is not None
