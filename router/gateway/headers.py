"""What of a head goes on, in both directions, and what belongs to one connection only (RFC 9110, 7.6.1).

Works on raw pairs, whose order and spelling it keeps. It adds no `X-Forwarded-*` and no `Via`: the servers behind
neither read them nor need to know who asked. It validates nothing that the parser has validated, but never writes a
line break into a head.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable

Headers = list[tuple[bytes, bytes]]

REQUEST_ID_CHARACTERS = 128
"""A longer one is cut."""

_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
_NEVER_BY_NAME = frozenset((b"content-length", b"content-type", b"content-encoding", b"host"))
"""What a Connection header may not name away: these say what the message is."""

_OURS = frozenset(
    (
        b"host",
        b"content-length",
        b"expect",  # answered here: the body is read before it is sent on
        b"origin",  # judged here, by this endpoint's list and not by the server's
        b"access-control-request-method",
        b"access-control-request-headers",
        b"access-control-request-private-network",
    )
)
_BODILESS = frozenset((b"GET", b"HEAD", b"OPTIONS"))
_ODD = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_BREAKS = re.compile(rb"[\r\n\x00]")


def upstream_headers(raw: Iterable[tuple[bytes, bytes]], host: bytes | None = None) -> Headers:
    """The request's headers for the server, without its framing, which the sender makes anew.

    `host` becomes the Host header where it is given; the client's never goes on, having been checked here.
    """
    pairs = list(raw)
    private = _private(pairs)
    kept = [(name, value) for name, value in pairs if _goes_on(name.lower(), private)]
    return kept if host is None else [(b"Host", host), *kept]


def request_head(
    method: bytes, target: bytes, raw: Iterable[tuple[bytes, bytes]], host: bytes, body_bytes: int | None
) -> bytes:
    """A whole HTTP/1.1 request head for the server, its blank line included.

    `body_bytes` is the length of the body, None for one of unknown length, which is to be sent in chunks.

    Raises:
        ValueError: a part has a line break or NUL in it, or the target a blank.
    """
    pairs = upstream_headers(raw, host)
    if body_bytes is None:
        pairs.append((b"Transfer-Encoding", b"chunked"))
    elif body_bytes or method not in _BODILESS:
        pairs.append((b"Content-Length", b"%d" % body_bytes))
    lines = [b" ".join((method, target, b"HTTP/1.1")), *(name + b": " + value for name, value in pairs)]
    if b" " in target or b" " in method or any(_BREAKS.search(line) for line in lines):
        raise ValueError("a request head with a line break, NUL or stray blank in it is not sent")
    return b"\r\n".join((*lines, b"", b""))


def reply_headers(raw: Iterable[tuple[bytes, bytes]], *, keep_framing: bool = False) -> Headers:
    """The reply's headers for the client.

    `keep_framing` leaves Transfer-Encoding in, for a relay that passes the body's chunks on as they came. Where a reply
    has both framings its Content-Length means nothing and is dropped (RFC 9112, 6.3).
    """
    pairs = list(raw)
    private = _private(pairs)
    chunked = any(name.lower() == b"transfer-encoding" for name, _ in pairs)

    def stays(lower: bytes) -> bool:
        if lower == b"transfer-encoding":
            return keep_framing
        return not (_is_private(lower, private) or (chunked and lower == b"content-length"))

    return [(name, value) for name, value in pairs if stays(name.lower())]


def header(raw: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, as Go's Header.Get gives it; `name` in lower case."""
    return next((value for key, value in raw if key.lower() == name), None)


def request_id(given: str | None, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The client's X-Request-ID, fit for logs and headers, or a new one where it gave none that is fit."""
    kept = _ODD.sub("", given or "")[:REQUEST_ID_CHARACTERS]
    return kept or make()


def _goes_on(lower: bytes, private: frozenset[bytes]) -> bool:
    return not (lower in _OURS or lower.startswith(b"x-llamayard-") or _is_private(lower, private))


def _is_private(lower: bytes, named: frozenset[bytes]) -> bool:
    return lower in _HOP_BY_HOP or lower.startswith(b"proxy-") or lower in named


def _private(pairs: Headers) -> frozenset[bytes]:
    """The headers that Connection names as this connection's own."""
    named = (value for name, value in pairs if name.lower() == b"connection")
    return frozenset(token.strip().lower() for value in named for token in value.split(b",")) - _NEVER_BY_NAME
