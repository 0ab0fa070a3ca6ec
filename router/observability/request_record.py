"""One request's own facts on its way through the gateway, and reading its body within limits."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from router.api.forwarding import Exchange
from router.domain.actions import Grant
from router.domain.instance import InstanceName
from router.errors import BodyTooLarge


class RequestRecord(msgspec.Struct):
    """Grows as the request goes; ends in one access-log line and one round of metrics."""

    request_id: str
    client: str
    route: str
    arrived_at: float
    wants_reason: bool = False
    model: str = ""
    instance: InstanceName | None = None
    granted_at: float | None = None
    error_code: str = ""
    cors: tuple[tuple[str, str], ...] = ()
    """Headers that let a browser's page read the answer."""
    notes: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    """Headers that tell what of the request was not passed on."""
    exchange: Exchange | None = None

    def granted(self, grant: Grant, now: float) -> None:
        self.instance = grant.instance
        self.granted_at = now

    def reply_headers(self, grant: Grant | None) -> dict[str, str]:
        """Who answered, and on request why there."""
        headers = {"Server": "llamayard", "X-Request-ID": self.request_id}
        headers.update(self.cors)
        headers.update(self.notes)
        if grant is not None:
            headers["X-Llamayard-Instance"] = grant.instance
            if self.wants_reason:
                headers["X-Llamayard-Reason"] = grant.reason.replace("\n", " ")
        return headers


async def read_body(request: web.BaseRequest, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it is longer than `server.max_body_bytes`.
    """
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)
    pieces: list[bytes] = []
    size = 0
    async for piece in request.content.iter_any():
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {max_bytes} bytes (server.max_body_bytes)")
