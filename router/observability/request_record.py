"""The facts of one request that its response headers, its access-log line and its metrics need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from router.domain.access_key import AccessKey
from router.domain.actions import Grant
from router.domain.instance import InstanceName
from router.errors import BadRequest, Forbidden, ModelNotFound
from router.llm_api.errors import CODE_HEADER

DEBUG_HEADER = "x-llamayard-debug"

CLIENT_GONE = 499
"""nginx's status for a client that left before its response; only logs and metrics see it."""

_UNROUTED_CODES: Mapping[int, str] = {400: BadRequest.code, 404: ModelNotFound.code}


class Charge(Protocol):
    """What a request takes of its access key's limits."""

    def reserve(self, prompt_tokens: int, output_tokens: int) -> None:
        """Reserves an estimate, once. Raises RateLimited."""
        ...

    def settle(self, prompt_tokens: int | None, output_tokens: int) -> None:
        """The request has ended. `prompt_tokens`: None if the answer does not say; then the estimate counts."""
        ...

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`."""
        ...


class RequestRecord(msgspec.Struct):
    """Filled in while the request is processed. Times are seconds on the controller's clock."""

    request_id: str
    client: str
    """`ClientIdentity.client`."""
    route: str
    arrived_at: float
    wants_reason: bool = False
    """Whether the response says why its instance was chosen."""
    key: AccessKey | None = None
    """The access key that it presents."""
    charge: Charge | None = None
    """Set if the key has limits."""
    hides_details: bool = False
    """Whether the request has no key where keys are on."""
    model: str = ""
    instance: InstanceName | None = None
    granted_at: float | None = None
    retry_reasons: tuple[str, ...] = ()
    """Why it was sent again, for each time (`RouterError.retry_reason`)."""
    error_code: str = ""
    refusal: str = ""
    """The header with its value for which the request is refused (403)."""
    is_retry_refused: bool = False
    """Whether it would have been tried again, if the budget had allowed it."""
    is_unrouted: bool = False
    """Whether the router found no model for the request: the server's 400 or 404 then says why."""
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

    def refuse(self, refusal: str) -> None:
        """The request is refused for this header and value, without a body."""
        self.error_code, self.refusal = Forbidden.code, refusal

    def unrouted_headers(self, status: int) -> dict[str, str]:
        """Additional headers of the server's response to an unrouted request; records its error code."""
        code = _UNROUTED_CODES.get(status) if self.is_unrouted else None
        if code is None:
            return {}
        self.error_code = code
        return {CODE_HEADER: code}

    def response_headers(self, grant: Grant | None = None) -> dict[str, str]:
        """Headers of the router's own: the request id, the instance that answers, and on request why."""
        headers = {"Server": "llamayard", "X-Request-ID": self.request_id}
        if self.cors_headers:
            headers.update(self.cors_headers)
        if self.substitution_headers:
            headers.update(self.substitution_headers)
        if self.charge is not None and self.route.startswith("/v1/"):
            headers.update(self.charge.headers())
        if grant is not None:
            headers["X-Llamayard-Instance"] = grant.instance
            if self.wants_reason:
                headers["X-Llamayard-Reason"] = grant.reason.replace("\n", " ")
        return headers


def asks_for_reason(debug_header: str | None) -> bool:
    """Whether a request's `X-Llamayard-Debug` is on."""
    return (debug_header or "") not in ("", "0", "false")
