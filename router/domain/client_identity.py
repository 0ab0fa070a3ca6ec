"""Who a request is from, and on what terms it asks for a slot."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.request import Layout


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    client: str = ""
    """For fairness and logs: `key:` and a digest, `user:` and a name, both joined by `/`, or the address."""
    session: str = ""
    """The conversation; "" where the client names none."""
    priority: int = 0
    """Larger goes first."""
    layout: Layout | None = None
    """Where the request insists on being served."""
