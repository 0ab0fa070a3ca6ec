"""Writes response heads and whole responses as bytes.

What they say is decided elsewhere. Header names and values come from a parser or from the program itself. A line break
in one would end the head early, so writing it raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from router.http1.headers import UNBUFFERED, Headers, is_stream, reply_headers
from router.http1.parser import ReplyHead, RequestHead

HeaderPairs = tuple[tuple[str, str], ...]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

_UNBUFFERED_LINE = ": ".join(UNBUFFERED).encode()
_KEEP = b"Connection: keep-alive\r\n"
_CLOSE = b"Connection: close\r\n"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class LocalResponse:
    """A whole response that was made here. Its sender adds length, date and connection."""

    status: int
    headers: HeaderPairs
    body: bytes = b""


def chunk(piece: bytes) -> bytes:
    """One chunk of a body; `piece` must not be empty."""
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def whole_response(request: RequestHead | None, response: LocalResponse, *, keep: bool) -> bytes:
    """A response with its length. `keep`: the connection stays open after it."""
    status = response.status
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b"Unknown")), *map(_line, response.headers)]
    if status >= 200 and status != 204:
        lines.append(b"Content-Length: %d\r\n" % len(response.body))
    lines.append(_connection_line(request, keep=keep))
    has_body = request is None or request.method != b"HEAD"
    return b"".join((*lines, b"\r\n", response.body if has_body else b""))


def relayed_head(reply: ReplyHead, added: Mapping[str, str], request: RequestHead, *, keep: bool) -> bytes:
    """The head of a relayed response: the upstream's end-to-end headers, and `added`, which take precedence."""
    names = tuple(added)
    if request.minor and reply.lines_without == names:
        lines = reply.lines
    else:
        lines = _upstream_lines(reply, added, keep_framing=bool(request.minor))
        if request.minor:
            reply.lines_without, reply.lines = names, lines
    text = "".join(map("%s: %s\r\n".__mod__, added.items()))
    if text.count("\n") != len(added) or text.count("\r") != len(added):
        raise ValueError("a line break in an added header")
    if keep and request.minor:
        return b"%s%s\r\n" % (lines, text.encode("latin-1", "replace"))
    return b"%s%s%s\r\n" % (lines, text.encode("latin-1", "replace"), _connection_line(request, keep=keep))


def _upstream_lines(reply: ReplyHead, added: Mapping[str, str], *, keep_framing: bool) -> bytes:
    """The status line and the upstream's headers without those in `added`."""
    replaced = {_lower(name) for name in added}
    headers = reply_headers(reply.headers, keep_framing=keep_framing)
    kept = [b"%s: %s" % pair for pair in headers if _lower(pair[0]) not in replaced]
    if is_stream(headers):
        kept.append(_UNBUFFERED_LINE)
    return b"\r\n".join((b"HTTP/1.1 %d %s" % (reply.status, reply.reason), *kept, b""))


def interim_head(reply: ReplyHead, headers: Headers) -> bytes:
    """The head of an interim response (1xx)."""
    lines = [b"HTTP/1.1 %d %s" % (reply.status, reply.reason), *(b"%s: %s" % pair for pair in headers), b"", b""]
    return b"\r\n".join(lines)


def early_head(headers: Iterable[tuple[str, str]], request: RequestHead, *, keep: bool) -> bytes:
    """The head of a response sent before the upstream's reply: chunks follow, or for HTTP/1.0 bytes until the close."""
    lines = [b"HTTP/1.1 200 OK\r\n", *map(_line, headers)]
    if request.minor:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    lines.append(_connection_line(request, keep=keep))
    lines.append(b"\r\n")
    return b"".join(lines)


def _connection_line(request: RequestHead | None, *, keep: bool) -> bytes:
    """The Connection header; none where HTTP/1.1 stays open."""
    if not keep:
        return _CLOSE
    return _KEEP if request is not None and not request.minor else b""


@lru_cache(maxsize=1024)
def _lower(name: str | bytes) -> str:
    text = name if isinstance(name, str) else name.decode("latin-1")
    return text.lower()


def _line(pair: tuple[str, str]) -> bytes:
    name, value = pair
    text = f"{name}: {value}"
    if "\r" in text or "\n" in text:
        raise ValueError(f"a line break in the header {name}")
    return text.encode("latin-1", "replace") + b"\r\n"
