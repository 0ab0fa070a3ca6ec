"""Keeps one client waiting: after a silence a head and bytes that its protocol ignores, until the reply begins.

A client that wants to know where it stands is told as soon as it waits.

What is sent, and to whom, stands in `llm_api/heartbeat_format.py`. It has no timer: whoever looks at deadlines asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from router.domain.actions import Grant
from router.domain.request import TicketId
from router.errors import RouterError
from router.http1.parser import RequestHead
from router.http1.response_writer import LAST_CHUNK, begun_head, chunk
from router.llm_api.heartbeat_format import Heartbeat
from router.proxy.interfaces import Send
from router.scheduler.queue.wait_estimate import WaitEstimate


class Client(Protocol):
    send: Send
    write_paused: bool

    def may_keep(self) -> bool: ...


class Queue(Protocol):
    def wait_estimate(self, ticket_id: TicketId) -> WaitEstimate | None: ...


class HeartbeatSender:
    """Beats for one request."""

    __slots__ = ("_beat", "_client", "_due", "_head", "_keep", "begun")

    def __init__(self, beat: Heartbeat, client: Client, head: RequestHead, now: float) -> None:
        self._beat = beat
        self._client = client
        self._head = head
        self._due = now + beat.seconds
        self._keep = False
        self.begun = False
        """Whether the answer's head is out."""

    def is_due(self, now: float) -> bool:
        return now >= self._due

    def waits(self, now: float) -> bool:
        """The request has begun to wait for a slot; whether its client is to be told at once."""
        if self._beat.tells:
            self._due = now
        return self._beat.tells

    def beat(
        self, now: float, own_headers: Mapping[str, str], queue: Queue, lease: TicketId | None, grant: Grant | None
    ) -> None:
        """Sends what keeps the client waiting; a client that takes nothing is sent nothing."""
        self._due = now + self._beat.seconds
        if self._client.write_paused:
            return
        wait_estimate = _wait_estimate(queue, lease, grant) if self._beat.tells else None
        piece = self._framed(self._beat.piece if wait_estimate is None else self._beat.telling(wait_estimate))
        if not self.begun:
            self.begun = True
            self._keep = bool(self._head.minor) and self._client.may_keep()
            piece = begun_head((*self._beat.headers, *own_headers.items()), self._head, keep=self._keep) + piece
        self._client.send(piece)

    def end(self, error: RouterError) -> bool:
        """Ends the answer with an error, now that its status is out; whether the connection may go on."""
        self._client.send(self._framed(self._beat.late_error(error)) + (LAST_CHUNK if self._head.minor else b""))
        return self._keep

    def _framed(self, piece: bytes) -> bytes:
        return chunk(piece) if self._head.minor and piece else piece


def _wait_estimate(queue: Queue, lease: TicketId | None, grant: Grant | None) -> WaitEstimate | None:
    if grant is not None:
        return WaitEstimate(0, 0.0, grant.reason)
    return None if lease is None else queue.wait_estimate(lease)
