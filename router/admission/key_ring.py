"""Finds the access key that a request presents.

A key is 256 random bits, so a plain SHA-256 of it is as good as a slow hash, and only that is kept. It is looked up by
its digest, and digests are compared in constant time: how long a look-up takes says nothing about any key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace

from router.domain.access_key import UNLIMITED, AccessKey
from router.http1.headers import HeaderLookup

KEY_PREFIX = "ly-"
"""Begins every key, so that a key is recognised wherever it turns up."""
KEY_BYTES = 32
_PRESENTED_CHARACTERS_MAX = 512
"""A longer value is no key and is not hashed."""


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class KeyRing:
    """The valid keys at one time. Immutable."""

    __slots__ = ("_by_digest", "next_expiry")

    def __init__(self, keys: Iterable[AccessKey], wall_seconds: float) -> None:
        """Leaves out keys that have expired at `wall_seconds` since 1970."""
        valid = [key for key in keys if key.is_valid(wall_seconds)]
        self._by_digest = {key.sha256: _normal(key) for key in valid}
        self.next_expiry = min((key.expires_at for key in valid if key.expires_at is not None), default=float("inf"))
        """When the next of them expires."""

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(key.name for key in self._by_digest.values())

    def find(self, header: HeaderLookup) -> AccessKey | None:
        """The first valid key that the request's headers present."""
        return next((key for text in presented(header) if (key := self._lookup(text)) is not None), None)

    def _lookup(self, text: str) -> AccessKey | None:
        digest = digest_of(text)
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None


def _normal(key: AccessKey) -> AccessKey:
    """One object for no limits, so that a request can be told to have none by its identity."""
    return replace(key, limits=UNLIMITED) if key.limits == UNLIMITED else key


class KeyStore:
    """Holds the current ring. Written by whatever watches the file, read by admission."""

    __slots__ = ("problem", "ring")

    def __init__(self, ring: KeyRing | None = None) -> None:
        self.ring = ring
        """None: keys are off."""
        self.problem = ""
        """Why the ring is not that of the file."""


def presented(header: HeaderLookup) -> Iterator[str]:
    """Keys in `Authorization` (Bearer, the password of Basic, or alone) and in `X-Api-Key`."""
    authorization = (header("authorization") or "").strip()
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "basic":
        yield from _kept(_basic_password(rest.strip()))
    else:
        yield from _kept(rest.strip() if rest else scheme)
    yield from _kept((header("x-api-key") or "").strip())


def _kept(text: str) -> Iterator[str]:
    if 0 < len(text) <= _PRESENTED_CHARACTERS_MAX:
        yield text


def _basic_password(encoded: str) -> str:
    try:
        decoded = base64.b64decode(encoded, validate=True).decode(errors="replace")
    except (binascii.Error, ValueError):
        return ""
    return decoded.partition(":")[2]
