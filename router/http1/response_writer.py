"""The bytes of answers' heads: those relayed, and whole answers that the router gives itself.

It only writes; what is said is decided elsewhere. Names and values come from a parser or from the router's own code,
and a line break in them would end the head early, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import lru_cache
from http import HTTPStatus

from router.http1.headers import Headers, reply_headers
from router.http1.parser import ReplyHead, RequestHead

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
_USUAL: Set[str] = frozenset(("Server", "X-Request-ID", "X-Llamayard-Instance"))
"""Headers that almost every relayed answer gets, and no others."""

_KEEP = b"Connection: keep-alive\r\n"
_CLOSE = b"Connection: close\r\n"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def chunk(piece: bytes) -> bytes:
    """One chunk of a body; the piece must not be empty."""
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def whole_answer(
    request: RequestHead | None, status: int, headers: Iterable[tuple[str, str]], body: bytes, *, keep: bool
) -> bytes:
    """A whole answer with its length. `keep`: the connection goes on after it."""
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b"Unknown")), *map(_line, headers)]
    if status >= 200 and status != 204:
        lines.append(b"Content-Length: %d\r\n" % len(body))
    lines.append(connection_line(request, keep=keep))
    bodiless = request is not None and request.method == b"HEAD"
    return b"".join((*lines, b"\r\n", b"" if bodiless else body))


def reply_head(reply: ReplyHead, own: Mapping[str, str], request: RequestHead, *, keep: bool) -> bytes:
    """The head of a relayed answer: the server's headers, as far as they go on, and our own, which win over them."""
    if request.minor and own.keys() == _USUAL:
        begun = reply.lines
        if begun is None:
            begun = reply.lines = _begun(reply, own, keep_framing=True)
    else:
        begun = _begun(reply, own, keep_framing=bool(request.minor))
    text = "\r\n".join([f"{name}: {value}" for name, value in own.items()])
    if text.count("\n") != len(own) - 1 or text.count("\r") != len(own) - 1:
        raise ValueError("a line break in a header of our own")
    return b"%s%s\r\n%s\r\n" % (begun, text.encode("latin-1", "replace"), connection_line(request, keep=keep))


def _begun(reply: ReplyHead, own: Mapping[str, str], *, keep_framing: bool) -> bytes:
    """The lines of the server's: all but our own, and the end."""
    ours = {_lower(name) for name in own}
    headers = [pair for pair in reply_headers(reply.headers, keep_framing=keep_framing) if _lower(pair[0]) not in ours]
    lines = [b"HTTP/1.1 %d %s" % (reply.status, reply.reason), *[b"%s: %s" % pair for pair in headers], b""]
    return b"\r\n".join(lines)


def interim_head(reply: ReplyHead, headers: Headers) -> bytes:
    """The head of an answer before the answer (1xx)."""
    lines = [b"HTTP/1.1 %d %s" % (reply.status, reply.reason), *(b"%s: %s" % pair for pair in headers), b"", b""]
    return b"\r\n".join(lines)


def begun_head(headers: Iterable[tuple[str, str]], request: RequestHead, *, keep: bool) -> bytes:
    """The head of an answer whose reply has not come yet: chunks follow, or for HTTP/1.0 bytes until the close."""
    lines = [b"HTTP/1.1 200 OK\r\n", *map(_line, headers)]
    if request.minor:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    lines.append(connection_line(request, keep=keep))
    lines.append(b"\r\n")
    return b"".join(lines)


def connection_line(request: RequestHead | None, *, keep: bool) -> bytes:
    """What must be said of the connection: nothing where HTTP/1.1 goes on."""
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
