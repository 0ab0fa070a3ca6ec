"""Heads of requests that came before, so that the next like one of them need not be parsed again.

Requests of one client differ in little but the length of their bodies. A head is like another where it has the same
bytes but for the digits of its Content-Length, and came from the same address, since what is made of a head depends on
that. What llhttp said of the one then holds for the other: the header is the same and is there once. Only whole heads
are looked for, only good ones are remembered, and of those the ones that were used last.
"""

from __future__ import annotations

import re

from router.http1.parser import RequestHead
from router.scheduler.lru import put

KNOWN_BYTES_MAX = 2048
"""A longer head is not remembered."""
KNOWN_MAX = 512

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})\r\n")

_Key = tuple[str, bytes, bytes]
"""The client's address, and what stands before and after the length's digits."""


class HeaderCache:
    """Mutable, one owner: all connections of a listener."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[_Key, RequestHead] = {}

    def find(self, peer: str, data: bytes) -> RequestHead | None:
        """The head with which `data` begins, its `raw` being its bytes, where one like it came from there."""
        end = data.find(b"\r\n\r\n", 0, KNOWN_BYTES_MAX) + 4
        if end < 4:
            return None
        raw = data[:end]
        key, length = _split(peer, raw)
        known = self._heads.get(key)
        if known is None:
            return None
        put(self._heads, key, known, KNOWN_MAX)
        return known if known.raw == raw else known.resized(length, raw)

    def remember(self, peer: str, head: RequestHead, raw: bytes) -> None:
        """`head` came whole in `raw`."""
        head.raw = raw
        if len(raw) <= KNOWN_BYTES_MAX:
            put(self._heads, _split(peer, raw)[0], head, KNOWN_MAX)


def _split(peer: str, raw: bytes) -> tuple[_Key, int | None]:
    found = _LENGTH.search(raw)
    if found is None:
        return (peer, raw, b""), None
    return (peer, raw[: found.start(1)], raw[found.end(1) :]), int(found[1])
