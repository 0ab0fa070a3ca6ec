"""Keeps one client waiting: after a silence a head and bytes that its protocol ignores, until the reply begins.

What is sent, and to whom, stands in `gateway/waiting.py`. It has no timer: whoever looks at deadlines asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from router.errors import RouterError
from router.gateway.waiting import Heartbeat
from router.relay.heads import RequestHead
from router.relay.parties import Send
from router.relay.replies import LAST_CHUNK, begun_head, chunk


class Client(Protocol):
    send: Send
    write_paused: bool

    def may_keep(self) -> bool: ...


class Heart:
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

    def beat(self, now: float, own_headers: Mapping[str, str]) -> None:
        """Sends what keeps the client waiting; a client that takes nothing is sent nothing."""
        self._due = now + self._beat.seconds
        if self._client.write_paused:
            return
        piece = self._framed(self._beat.piece)
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
