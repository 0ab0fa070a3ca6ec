"""How well a replica or an instance has answered lately, and whether it is ejected from service for a while."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.domain.request import TicketId


class ReplyFailure(StrEnum):
    """How a server failed a request. A client that leaves is none, and neither is an error of the client (4xx)."""

    LOST = "lost"
    """Refused, reset, ended within its reply, or its runner died."""
    TIMEOUT = "timeout"
    """It sent nothing in time."""
    ERROR = "error"
    """It answered with a status of 500 or more."""
    OVERLOADED = "overloaded"
    """It answered with 429 or 503: it works, and has enough to do."""


@dataclass(frozen=True, slots=True)
class Health:
    """Kept from the first failure until the replica or instance has been well for a while."""

    consecutive_failures: int = 0
    failures: float = 0.0
    """Decayed to `at`, as is `requests`."""
    requests: float = 0.0
    at: float = 0.0
    ejections: int = 0
    """In a row."""
    ejected_until: float = float("-inf")
    """After that one request is let through; if it succeeds, all are."""
    is_half_open: bool = False
    """Whether it still has to show with one request that it is well."""
    probe: TicketId | None = None
    """The request that is let through, while it runs."""
    reason: str = ""

    def refuses(self, now: float) -> bool:
        """Returns True if no request is let through now."""
        return now < self.ejected_until or (self.is_half_open and self.probe is not None)
