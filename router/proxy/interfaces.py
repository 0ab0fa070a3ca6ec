"""What the proxy needs of the rest of the router, and what its own parts know of each other.

Small protocols, so that the proxy can be tested with a scripted controller, and each part with scripted neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from router.domain.actions import Grant, Reject
from router.domain.events import Event
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceName, InstanceView
from router.domain.model import ModelFacts
from router.domain.request import Ticket, TicketId
from router.engines.base import EngineTarget
from router.errors import InstanceLost, RouterError
from router.http1.response_writer import LocalResponse
from router.observability.request_record import RequestRecord
from router.scheduler.queue.wait_estimate import WaitEstimate


class Send(Protocol):
    """A transport's `write`, stored as a callable so that a piece costs one call."""

    def __call__(self, data: bytes, /) -> None: ...


def discard(_: bytes, /) -> None:
    """A `Send` for a connection that is gone or not in use."""


# --- the rest of the router ------------------------------------------------------------------------------------


class SlotQueue(Protocol):
    """The controller. All of it is synchronous."""

    def now(self) -> float: ...

    def new_ticket_id(self) -> TicketId: ...

    def submit(self, ticket: Ticket, decided: Callable[[Grant | Reject], None]) -> None: ...

    def cancel(self, ticket_id: TicketId) -> None: ...

    def release(
        self,
        ticket_id: TicketId,
        *,
        runner_lost: bool = False,
        output_tokens: int = 0,
        first_byte_at: float | None = None,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> None: ...

    def wait_estimate(self, ticket_id: TicketId) -> WaitEstimate | None: ...

    def post(self, event: Event) -> None: ...


class ModelCatalog(Protocol):
    def known(self, name: str) -> ModelFacts | None: ...

    async def facts(self, name: str) -> ModelFacts | None: ...


class EngineModels(Protocol):
    """The models of servers that are not Ollama."""

    def known(self, name: str) -> ModelFacts | None: ...

    def target(self, instance: InstanceName, model: ModelFacts) -> EngineTarget:
        """How that server is asked for the model."""
        ...

    async def refuse_missing(self, model: ModelFacts, path: str) -> None:
        """
        Raises:
            BadRequest: a server of the model does not have the path.
            InstanceLost: it cannot be asked.
        """
        ...


class EndpointSupport(Protocol):
    """Which endpoints the servers have, where that differs between versions."""

    def known(self, view: InstanceView, path: str) -> bool | None: ...

    async def has(self, view: InstanceView, path: str) -> bool: ...


class RequestLog(Protocol):
    """The access log: each request begins and ends in it exactly once."""

    def began(self) -> None: ...

    def ended(self, record: RequestRecord, method: str, path: str, status: int) -> None: ...


# --- parts of the proxy ----------------------------------------------------------------------------------------


class Listener(Protocol):
    """Accepts connections."""

    closing: bool
    """No response may promise to keep its connection open."""
    long_bodies: int
    """How many came so far."""

    @property
    def is_full(self) -> bool:
        """Whether more connections are open than there may be."""
        ...

    def opened(self, connection: asyncio.Protocol) -> None: ...

    def lost(self, connection: asyncio.Protocol) -> None: ...


class Client(Protocol):
    """The connection that a response goes to."""

    write_paused: bool
    send: Send

    def may_keep(self) -> bool:
        """Whether the connection may stay open after this response."""
        ...

    def abort(self) -> None:
        """Cuts the connection, if the response cannot be ended visibly in any other way."""
        ...


class Requester(Client, Protocol):
    """The same connection, as seen by the exchange that works on its request."""

    def respond(self, response: LocalResponse) -> None:
        """Sends a whole response. Ends the exchange."""
        ...

    def response_ended(self, *, keep: bool) -> None:
        """The response is out. Ends the exchange."""
        ...

    def body_blocked(self, *, blocked: bool) -> None:
        """The server stops, or resumes, taking the request's body."""
        ...


class ResponseOwner(Protocol):
    """The exchange that a reply belongs to. Exactly one of the last five methods is called, once."""

    def response_begins(self) -> Mapping[str, str]:
        """The response's head is about to be sent; returns the router's own headers for it."""
        ...

    def progressed(self, now: float) -> None:
        """Bytes have come since the last check of the deadlines."""
        ...

    def request_blocked(self, *, blocked: bool) -> None:
        """The server stops, or resumes, taking the request."""
        ...

    def may_try_elsewhere(self, status: int) -> bool:
        """Whether a reply with this status, 500 or more, may be dropped, and the request tried elsewhere."""
        ...

    def reply_refused(self, error: RouterError) -> None:
        """No byte is out, and the request is to be tried elsewhere. Only after `may_try_elsewhere`."""
        ...

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        """No byte is out. `stale`: a reused connection had already been closed by the server."""
        ...

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        """No byte is out, and a retry would not help. `hangs`: the replica may not respond to others either."""
        ...

    def reply_broken(self, error: RouterError, *, keep: bool, died: bool) -> None:
        """Bytes are out; the response was ended with an error or cut. `keep`: its framing is complete."""
        ...

    def reply_done(self, *, reusable: bool, keep: bool, died: bool) -> None:
        """The last byte is out. `died`: the reply says, or shows, that its runner died."""
        ...
