"""What of a head goes on, in both directions, and what belongs to one connection only (RFC 9110, 7.6.1).

Works on raw pairs, whose order and spelling it keeps. It adds no `X-Forwarded-*` and no `Via`: the servers behind
neither read them nor need to know who asked. It validates nothing that the parser has validated, but never writes a
line break into a head.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from functools import lru_cache

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
_NOTHING = frozenset[bytes]()


def upstream_headers(raw: Iterable[tuple[bytes, bytes]], host: bytes | None = None) -> Headers:
    """The request's headers for the server, without its framing, which the sender makes anew.

    `host` becomes the Host header where it is given; the client's never goes on, having been checked here.
    """
    pairs = list(raw)
    private = _private(pairs)
    kept = [pair for pair in pairs if _goes_on(pair[0])]
    if private:
        kept = [pair for pair in kept if _lower(pair[0]) not in private]
    return kept if host is None else [(b"Host", host), *kept]


def request_head(
    method: bytes, target: bytes, raw: Iterable[tuple[bytes, bytes]], host: bytes, body_bytes: int | None
) -> bytes:
    """A whole HTTP/1.1 request head for the server, its blank line included.

    `body_bytes` is the length of the body, None for one of unknown length, which is to be sent in chunks.

    Raises:
        ValueError: a part has a line break or NUL in it, or the target a blank.
    """
    begun = begun_request(method, target, raw, host)
    if body_bytes is None:
        return begun + b"Transfer-Encoding: chunked\r\n\r\n"
    if body_bytes or method not in _BODILESS:
        return b"%sContent-Length: %d\r\n\r\n" % (begun, body_bytes)
    return begun + b"\r\n"


def begun_request(method: bytes, target: bytes, raw: Iterable[tuple[bytes, bytes]], host: bytes) -> bytes:
    """The lines of a request head but for its framing and its end.

    Raises:
        ValueError: as for `request_head`.
    """
    pairs = upstream_headers(raw, host)
    lines = [b" ".join((method, target, b"HTTP/1.1")), *[b"%s: %s" % pair for pair in pairs], b""]
    head, breaks = b"\r\n".join(lines), len(lines) - 1
    clean = head.count(b"\n") == breaks == head.count(b"\r") and b"\0" not in head
    if b" " in target or b" " in method or not clean:
        raise ValueError("a request head with a line break, NUL or stray blank in it is not sent")
    return head


def reply_headers(raw: Iterable[tuple[bytes, bytes]], *, keep_framing: bool = False) -> Headers:
    """The reply's headers for the client.

    `keep_framing` leaves Transfer-Encoding in, for a relay that passes the body's chunks on as they came. Where a reply
    has both framings its Content-Length means nothing and is dropped (RFC 9112, 6.3).
    """
    pairs = list(raw)
    private = _private(pairs)
    kept: Headers = []
    chunked = False
    for pair in pairs:
        lower = _lower(pair[0])
        if lower == b"transfer-encoding":
            chunked = True
            if not keep_framing:
                continue
        elif _is_hop_by_hop(lower) or (private and lower in private):
            continue
        kept.append(pair)
    return [pair for pair in kept if _lower(pair[0]) != b"content-length"] if chunked else kept


def header(raw: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, as Go's Header.Get gives it; `name` in lower case."""
    return next((value for key, value in raw if key.lower() == name), None)


def request_id(given: str | None, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The client's X-Request-ID, fit for logs and headers, or a new one where it gave none that is fit."""
    kept = _ODD.sub("", given or "")[:REQUEST_ID_CHARACTERS]
    return kept or make()


# The same few names come with every message: what they mean is worked out once.


@lru_cache(maxsize=1024)
def _lower(name: bytes) -> bytes:
    return name.lower()


@lru_cache(maxsize=1024)
def _goes_on(name: bytes) -> bool:
    """Whether a request's header goes to the server, unless Connection names it."""
    lower = name.lower()
    return not (lower in _OURS or lower.startswith(b"x-llamayard-") or _is_hop_by_hop(lower))


@lru_cache(maxsize=1024)
def _is_hop_by_hop(lower: bytes) -> bool:
    return lower in _HOP_BY_HOP or lower.startswith(b"proxy-")


def _private(pairs: Headers) -> frozenset[bytes]:
    """The headers that Connection names as this connection's own."""
    named = [value for name, value in pairs if _lower(name) == b"connection"]
    if not named:
        return _NOTHING
    return frozenset(token.strip().lower() for value in named for token in value.split(b",")) - _NEVER_BY_NAME
