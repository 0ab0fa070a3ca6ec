"""Parses request and reply heads strictly with llhttp, and determines how the body after each is framed.

llhttp rejects whatever two parsers could read differently: bare line feeds, folded lines, spaces before a colon, two
lengths, a length together with chunks. The checks that it leaves to its user are made here (RFC 9112, 3.2 and 6): one
Host, versions 1.0 and 1.1, no transfer encoding but `chunked`. A parser is fed one head and never the bytes after it,
so that the end of a body is found in one place only, `router/http1/body_framing.py`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import httptools

from router.http1.body_framing import Body, Chunked, NoBody, Sized, UntilClose

HEAD_BYTES_MAX = 65536
"""A longer request head gets 431; a longer reply head ends the exchange."""

LENGTH_MAX = 2**63 - 1
"""The largest Content-Length that a Go server reads; a longer one gets 400, as there."""

NAME_BYTES_MAX = 256
"""A longer header name gets 431."""

_BLANK = b"\r\n\r\n"
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
_TOKEN = re.compile(rb"[A-Za-z]+ /")
_HOST = re.compile(rb"[A-Za-z0-9!$%&'()*+,.:;=\[\]_~-]*")
"""The characters that Go takes in a Host."""
_AUTHORITY = re.compile(rb"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def origin_form(target: bytes) -> tuple[bytes, bytes]:
    """Splits a request target in absolute form into path with query, and the authority (RFC 9112, 3.2.2).

    Any other target is returned as it is, with no authority.
    """
    found = _ABSOLUTE.match(target)
    if found is None:
        return target, b""
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest, found[1].rpartition(b"@")[2]


class HeadError(Exception):
    """An invalid head. `status` is for the response, where the sender is a client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Head:
    """Common to both kinds: feeding until the blank line, headers in order, framing.

    Defaults are class attributes, so that a typical head stores little of its own.
    """

    minor = 1
    """The minor version: HTTP/1.0 or HTTP/1.1."""
    length: int | None = None
    chunked = False
    keep_alive = True
    """Whether the head lets the connection stay open after this message."""
    _unsupported = ""
    _complete = False
    _size = 0
    _tail = b""
    _parser: Any

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        """In order of arrival."""

    def feed(self, data: bytes, start: int = 0) -> int:
        """Parses the bytes from `start` on; returns the index after the head's last byte, or -1 until then.

        Must not be called again once the head is complete.

        Raises:
            HeadError: the head is invalid.
        """
        end = self._end(data, start)
        if end >= 0:
            piece = data if not start and end == len(data) else data[start:end]
        else:
            piece = data[start:] if start else data
            self._tail = (self._tail + piece)[-3:]
        self._size += len(piece)
        if self._size > HEAD_BYTES_MAX:
            raise HeadError(431, "Request Header Fields Too Large")
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._upgrades()
        except httptools.HttpParserInvalidMethodError as error:
            is_token = _TOKEN.match(piece) is not None
            raise HeadError(501 if is_token else 400, "Not Implemented" if is_token else "Bad Request") from error
        except httptools.HttpParserError as error:
            raise HeadError(400, "Bad Request") from error
        if end < 0:
            return end
        if not self._complete:
            raise HeadError(400, "Bad Request")
        parser, self._parser = self._parser, None  # the parser refers back to this object
        self._validate(parser)
        return end

    @property
    def is_begun(self) -> bool:
        """Whether part of it has been parsed."""
        return self._size > 0

    def _end(self, data: bytes, start: int) -> int:
        """The index after the blank line, which may have begun in an earlier piece; -1 if it has not come yet."""
        tail = self._tail
        if tail:
            across = (tail + data[start : start + 3]).find(_BLANK)
            if across >= 0:
                return start + across + 4 - len(tail)
        end = data.find(_BLANK, start)
        return end + 4 if end >= 0 else end

    def _validate(self, parser: Any) -> None:
        raise NotImplementedError

    def _upgrades(self) -> None:
        pass

    def _note_framing(self, lower: str, value: bytes) -> None:
        """Records a header that frames the body."""
        if lower == "content-length":
            self.length = int(value)
        elif lower == "transfer-encoding":
            self.chunked = True
            if value.strip().lower() != b"chunked":
                self._unsupported = "unsupported transfer encoding"

    # --- called by the parser --------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self._complete = True
        # Read here: after a message without a body the parser has already forgotten its headers.
        self.keep_alive = self._parser.should_keep_alive()


class RequestHead(_Head):
    """One request's head; filled in by the parser's callbacks."""

    method = b""
    target = b""
    """In origin form: the authority of an absolute one has replaced the value of Host."""
    was_absolute = False
    hosts = 0
    raw = b""
    """All of its bytes, where its user caches it."""
    derived: Any = None
    """Whatever its user derives from it; kept by `resized`."""
    upgrade = False
    """Whether it asks for another protocol."""
    _long_name = False
    _line = b""
    """The start line, and perhaps more."""

    def __init__(self) -> None:
        self.headers = []
        self._values: dict[str, bytes] = {}
        self._parser = httptools.HttpRequestParser(self)

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)

    @property
    def expects_continue(self) -> bool:
        """Whether its body comes only after `100 Continue`."""
        return self.minor == 1 and "expect" in self._values and self.has_body

    def resized(self, length: int | None, raw: bytes) -> RequestHead:
        """The same head with another body length. Its `headers` keep the original length."""
        other = RequestHead.__new__(RequestHead)
        other.__dict__.update(self.__dict__)
        other.length, other.raw = length, raw
        return other

    def body(self, payload: list[bytes] | None = None) -> Body:
        """Finds the end of the request; `payload` as for `Chunked`."""
        if self.chunked:
            return Chunked(payload)
        return Sized(self.length) if self.length else NoBody()

    def text(self, name: str) -> str | None:
        """The first value of a header, like Go's Header.Get; `name` in lower case."""
        value = self._values.get(name)
        return None if value is None else value.decode("latin-1")

    def texts(self, name: str) -> list[str]:
        """All values of a header in their order; `name` in lower case."""
        return [value.decode("latin-1") for key, value in self.headers if _lower(key) == name]

    def feed(self, data: bytes, start: int = 0) -> int:
        if not self._line.endswith(b"\n"):
            line_end = data.find(b"\n", start) + 1
            self._line += data[start : line_end or None]
        return super().feed(data, start)

    def _validate(self, parser: Any) -> None:
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise HeadError(505, "HTTP Version Not Supported")
            self.minor = 0
        self.method = parser.get_method()
        if self.method == b"CONNECT":
            raise HeadError(501, "Not Implemented: CONNECT")
        if self.length is not None and self.length > LENGTH_MAX:
            raise HeadError(400, "Bad Request")
        self._check_as_go()
        if self._long_name:
            raise HeadError(431, "Request Header Fields Too Large")
        if self._unsupported:
            raise HeadError(501, f"Not Implemented: {self._unsupported}")
        if self.hosts != 1 and (self.hosts or self.minor):
            raise HeadError(400, "Bad Request: exactly one Host header is required")
        if self.chunked and not self.minor:
            raise HeadError(400, "Bad Request: HTTP/1.0 does not support chunks")
        if self._values.get("expect", b"").strip().lower() not in (b"", b"100-continue"):
            raise HeadError(417, "Expectation Failed")
        if not self.target.startswith(b"/"):
            self._take_origin_form()

    def _check_as_go(self) -> None:
        """What llhttp takes and a Go server refuses: more blanks in the start line, other characters, bad escapes."""
        if self._line != b"%s %s HTTP/1.%d\r\n" % (self.method, self.target, self.minor):
            raise HeadError(400, "Bad Request")
        if self.hosts and not _HOST.fullmatch(self._values["host"]):
            raise HeadError(400, "Bad Request: malformed Host header")
        if b"%" in self.target and _BAD_ESCAPE.search(self.target.partition(b"?")[0]):
            raise HeadError(400, "Bad Request: malformed escape in the path")

    def _take_origin_form(self) -> None:
        target, authority = origin_form(self.target)
        self.was_absolute = target is not self.target
        self.target = target
        if not _AUTHORITY.fullmatch(authority):
            raise HeadError(400, "Bad Request: malformed authority")
        if authority:
            self._values["host"] = authority
            self.headers = [(b"Host", authority), *(pair for pair in self.headers if pair[0].lower() != b"host")]

    def rewritten(self) -> bytes:
        """The head's bytes with its target in origin form."""
        line = b"%s %s HTTP/1.%d" % (self.method, self.target, self.minor)
        return b"\r\n".join((line, *(b"%s: %s" % pair for pair in self.headers), b"", b""))

    def _upgrades(self) -> None:
        self.upgrade = True

    # --- called by the parser --------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) > NAME_BYTES_MAX:
            self._long_name = True
            return
        self.headers.append((name, value))
        lower = _lower(name)
        if lower not in self._values:
            self._values[lower] = value
        if lower in _FRAMING:
            if lower == "host":
                self.hosts += 1
            else:
                self._note_framing(lower, value)


class ReplyHead(_Head):
    """One reply's head, as an upstream server sent it to a request whose method is not HEAD."""

    status = 0
    reason = b""
    is_stream: bool | None = None
    """Whether its content type is that of a stream; None until someone checks."""
    lines = b""
    """Its lines for clients without the headers in `lines_without`: see `router/http1/response_writer.py`."""
    lines_without: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self.headers = []
        self._parser = httptools.HttpResponseParser(self)

    def body(self, *, without: bool = False, payload: list[bytes] | None = None) -> Body:
        """Finds the end of the reply. `without`: it answers HEAD and has no body, whatever its headers say."""
        if without or self.status < 200 or self.status in (204, 304):
            return NoBody()
        if self.chunked:
            return Chunked(payload)
        return UntilClose() if self.length is None else Sized(self.length)

    def _validate(self, parser: Any) -> None:
        version = parser.get_http_version()
        if version != "1.1":
            if version != "1.0":
                raise HeadError(502, f"the reply's version is {version}")
            self.minor = 0
        self.status = parser.get_status_code()
        if self._unsupported:
            raise HeadError(502, f"the reply has an {self._unsupported}")

    # --- called by the parser --------------------------------------------------------------------------------

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))
        if len(name) > NAME_BYTES_MAX:
            self._unsupported = "overlong header name"
        if len(name) in _FRAMING_LENGTHS:
            self._note_framing(name.lower().decode("latin-1"), value)


@lru_cache(maxsize=1024)
def _lower(name: bytes) -> str:
    """Cached, because the same few names come with every message."""
    return name.lower().decode("latin-1")


_FRAMING = frozenset(("content-length", "transfer-encoding", "host"))
_FRAMING_LENGTHS = frozenset((len("content-length"), len("transfer-encoding")))
