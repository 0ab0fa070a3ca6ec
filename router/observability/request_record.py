"""The facts of one request that its response headers, its access-log line and its metrics need."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from router.domain.actions import Grant
from router.domain.instance import InstanceName

DEBUG_HEADER = "x-llamayard-debug"


class RequestRecord(msgspec.Struct):
    """Filled in while the request is processed. Times are seconds on the controller's clock."""

    request_id: str
    client: str
    """`ClientIdentity.client`."""
    route: str
    arrived_at: float
    wants_reason: bool = False
    """Whether the response says why its instance was chosen."""
    model: str = ""
    instance: InstanceName | None = None
    granted_at: float | None = None
    error_code: str = ""
    cors_headers: tuple[tuple[str, str], ...] = ()
    """Let a browser's page read the response."""
    substitution_headers: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    """Name the model that answers instead of the requested one, and options that were not forwarded."""
    first_byte_at: float | None = None
    """When the first byte of the reply's body came from the instance; None where none came."""
    last_byte_at: float | None = None
    bytes_out: int = 0
    """Bytes of the reply's body, with its framing where it was relayed with it."""
    chunks: int = 0
    """Non-empty HTTP chunks of the reply: for a stream about its tokens."""
    tail: bytes = b""
    """The end of the reply, enough to read token counts from its last line."""

    def response_headers(self, grant: Grant | None = None) -> dict[str, str]:
        """Headers of the router's own: the request id, the instance that answers, and on request why."""
        headers = {"Server": "llamayard", "X-Request-ID": self.request_id}
        if self.cors_headers:
            headers.update(self.cors_headers)
        if self.substitution_headers:
            headers.update(self.substitution_headers)
        if grant is not None:
            headers["X-Llamayard-Instance"] = grant.instance
            if self.wants_reason:
                headers["X-Llamayard-Reason"] = grant.reason.replace("\n", " ")
        return headers


def asks_for_reason(debug_header: str | None) -> bool:
    """Whether a request's `X-Llamayard-Debug` is on."""
    return (debug_header or "") not in ("", "0", "false")
