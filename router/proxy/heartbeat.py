"""Keeps a waiting client's connection alive: sends a head and bytes that its protocol ignores until the reply begins.

What is sent, and to whom, is decided in `llm_api/heartbeat_format.py`; when, by `ProxyExchange.check`.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.domain.actions import Grant
from router.domain.request import TicketId
from router.errors import RouterError
from router.http1.headers import UNBUFFERED
from router.http1.parser import RequestHead
from router.http1.response_writer import LAST_CHUNK, chunk, early_head
from router.llm_api.heartbeat_format import Heartbeat
from router.proxy.interfaces import Client, SlotQueue
from router.scheduler.queue.wait_estimate import WaitEstimate


class HeartbeatSender:
    """Sends the heartbeats of one request."""

    __slots__ = ("_client", "_format", "_keep", "_request", "head_sent")

    def __init__(self, heartbeat: Heartbeat, client: Client, request: RequestHead) -> None:
        self._format = heartbeat
        self._client = client
        self._request = request
        self._keep = False
        self.head_sent = False
        """Whether the response's head, with status 200, is out."""

    def beat(
        self, added_headers: Mapping[str, str], queue: SlotQueue, lease: TicketId | None, grant: Grant | None
    ) -> None:
        """Sends one heartbeat, unless the client does not take what was sent before."""
        if self._client.write_paused:
            return
        estimate = _wait_estimate(queue, lease, grant) if self._format.reports_progress else None
        piece = self._framed(self._format.piece if estimate is None else self._format.progress_piece(estimate))
        if not self.head_sent:
            self.head_sent = True
            self._keep = bool(self._request.minor) and self._client.may_keep()
            headers = (*self._format.headers, UNBUFFERED, *added_headers.items())
            piece = early_head(headers, self._request, keep=self._keep) + piece
        self._client.send(piece)

    def end(self, error: RouterError) -> bool:
        """Ends the response with an error, after its head; returns whether the connection may stay open."""
        end = LAST_CHUNK if self._request.minor else b""
        self._client.send(self._framed(self._format.late_error(error)) + end)
        return self._keep

    def finish(self, body: bytes) -> bool:
        """Ends the response with its body, after its head; returns whether the connection may stay open."""
        self._client.send(self._framed(body) + (LAST_CHUNK if self._request.minor else b""))
        return self._keep

    def _framed(self, piece: bytes) -> bytes:
        return chunk(piece) if self._request.minor and piece else piece


def _wait_estimate(queue: SlotQueue, lease: TicketId | None, grant: Grant | None) -> WaitEstimate | None:
    if grant is not None:
        return WaitEstimate(0, 0.0, grant.reason)
    return None if lease is None else queue.wait_estimate(lease)
