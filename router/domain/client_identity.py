"""The client of a request, and its scheduling terms."""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.access_key import AccessKey
from router.domain.request import Layout


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """What admission reads from a request's key, headers and address."""

    client: str = ""
    """For fairness and logs: `key:USER` of an access key; else `key:DIGEST`, `user:NAME`, both joined by `/`, or the
    address."""
    session: str = ""
    """Id of the conversation; "" if the client sends none."""
    priority: int = 0
    """Larger values are served first."""
    layout: Layout | None = None
    """Layout that the request requires; None for any."""
    key: AccessKey | None = None
    """The valid access key that it presents; None without one, or where keys are off."""
