"""Which headers a proxy forwards, in both directions, and which belong to one connection only (RFC 9110, 7.6.1).

Works on raw pairs and keeps their order and spelling. It adds no `X-Forwarded-*`: upstream servers do not read them.
The caller adds `Via` (`router/http1/via.py`). It does not repeat the parser's validation, but never writes a line break
into a head.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from functools import lru_cache

Headers = list[tuple[bytes, bytes]]

HeaderLookup = Callable[[str], str | None]
"""The first value of a request's header by its name in lower case, decoded as Latin-1; None where it is absent."""

REQUEST_ID_CHARACTERS = 128
"""A longer one is truncated."""

UNBUFFERED = ("X-Accel-Buffering", "no")
"""On streams: nginx would otherwise collect tokens and send them late."""
_STREAM_TYPES = (b"application/x-ndjson", b"text/event-stream")

_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"))
_NEVER_BY_NAME = frozenset((b"content-length", b"content-type", b"content-encoding", b"host"))
"""Headers that a Connection header cannot remove, because they describe the message itself."""

_NOT_FORWARDED = frozenset(
    (
        b"host",
        b"content-length",
        b"authorization",  # the router's own keys; Ollama has no authentication
        b"x-api-key",
        b"expect",  # handled by the proxy, which reads the body before forwarding it
        b"origin",  # checked by the proxy against its own list, not the server's
        b"access-control-request-method",
        b"access-control-request-headers",
        b"access-control-request-private-network",
    )
)
_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_NO_NAMES = frozenset[bytes]()


def upstream_headers(raw: Iterable[tuple[bytes, bytes]], host: bytes | None = None) -> Headers:
    """The request's headers for the server, without framing, which the sender writes itself.

    `host` becomes the Host header if given; the client's own is never forwarded.
    """
    pairs = list(raw)
    private = _named_by_connection(pairs)
    kept = [pair for pair in pairs if _is_forwarded(pair[0])]
    if private:
        kept = [pair for pair in kept if _lower(pair[0]) not in private]
    return kept if host is None else [(b"Host", host), *kept]


def request_lines(
    method: bytes,
    target: bytes,
    raw: Iterable[tuple[bytes, bytes]],
    host: bytes,
    added: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """The lines of a request head without framing and the blank line. `added`: headers of the router's own.

    Raises:
        ValueError: a part contains a line break or NUL, or the target a space.
    """
    pairs = [*upstream_headers(raw, host), *added]
    lines = [b" ".join((method, target, b"HTTP/1.1")), *[b"%s: %s" % pair for pair in pairs], b""]
    head, breaks = b"\r\n".join(lines), len(lines) - 1
    clean = head.count(b"\n") == breaks == head.count(b"\r") and b"\0" not in head
    if b" " in target or b" " in method or not clean:
        raise ValueError("a request head containing a line break, NUL or stray space is not sent")
    return head


def reply_headers(raw: Iterable[tuple[bytes, bytes]], *, keep_framing: bool = False) -> Headers:
    """The reply's headers for the client.

    `keep_framing` keeps Transfer-Encoding, for a relay that forwards the body's chunks unchanged. Where a reply has
    both framings, its Content-Length is meaningless and dropped (RFC 9112, 6.3).
    """
    pairs = list(raw)
    private = _named_by_connection(pairs)
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
    """The first value of a header, like Go's Header.Get; `name` in lower case."""
    return next((value for key, value in raw if key.lower() == name), None)


def is_stream(raw: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a reply's content type is that of a stream."""
    return (header(raw, b"content-type") or b"").startswith(_STREAM_TYPES)


def request_id(given: str | None, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The client's X-Request-ID, sanitized for logs and headers; a new one where it sent none."""
    return sanitized_request_id(given) or make()


def sanitized_request_id(given: str | None) -> str:
    """The client's X-Request-ID, fit for logs and headers; "" where nothing of it is."""
    return _UNSAFE.sub("", given or "")[:REQUEST_ID_CHARACTERS]


# The same few names come with every message, so their meaning is cached.


@lru_cache(maxsize=1024)
def _lower(name: bytes) -> bytes:
    return name.lower()


@lru_cache(maxsize=1024)
def _is_forwarded(name: bytes) -> bool:
    """Whether a request's header is forwarded, unless Connection names it."""
    lower = name.lower()
    return not (lower in _NOT_FORWARDED or lower.startswith(b"x-llamayard-") or _is_hop_by_hop(lower))


@lru_cache(maxsize=1024)
def _is_hop_by_hop(lower: bytes) -> bool:
    return lower in _HOP_BY_HOP or lower.startswith(b"proxy-")


def _named_by_connection(pairs: Headers) -> frozenset[bytes]:
    """Headers that Connection declares hop-by-hop."""
    named = [value for name, value in pairs if _lower(name) == b"connection"]
    if not named:
        return _NO_NAMES
    return frozenset(token.strip().lower() for value in named for token in value.split(b",")) - _NEVER_BY_NAME
