"""The `Via` header of this router (RFC 9110, 7.6.3): how it recognises a request that has passed through it before.

Every request that the router sends to a server carries it, so that a loop (an attached server, or a proxy behind the
router, that leads back to it) ends at the second pass instead of going round. Each run of a router has its own name, so
that routers can be behind each other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from router.http1.headers import Headers


def _new_name() -> str:
    return f"llamayard-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Via:
    """This run's entry."""

    name: str = field(default_factory=_new_name)

    @property
    def value(self) -> str:
        return f"1.1 {self.name}"

    def header(self) -> tuple[bytes, bytes]:
        return b"Via", self.value.encode()

    def is_in(self, passed: str) -> bool:
        """Whether this router is one of those that a request passed; a proxy may have joined or commented entries."""
        return self.name in passed


def passed(headers: Headers) -> str:
    """The value of a request's `Via`, all its lines joined; "" where there is none."""
    return ", ".join(value.decode("latin-1") for name, value in headers if name.lower() == b"via")
