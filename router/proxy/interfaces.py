"""Who a reply is between, as far as `router/proxy/response_stream.py` knows them: the client's connection, and whoever
asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from router.admission.origin_check import Answer
from router.errors import InstanceLost, RouterError


class Send(Protocol):
    """A transport's `write`, kept as it is, so that a piece costs one call."""

    def __call__(self, data: bytes, /) -> None: ...


def nowhere(_: bytes, /) -> None:
    """Where bytes go that nobody takes: the connection is gone, or has not been asked for them."""


class Client(Protocol):
    """The connection that the answer goes to."""

    write_paused: bool
    send: Send

    def may_keep(self) -> bool:
        """Whether the connection may go on after this answer."""
        ...

    def abort(self) -> None:
        """Cuts the connection: the answer cannot be ended visibly in any other way."""
        ...


class Requester(Client, Protocol):
    """The same connection, as whoever works on its request knows it."""

    def answer(self, answer: Answer) -> None:
        """Sends a whole answer of the router's own. The exchange is over with it."""
        ...

    def answered(self, *, keep: bool) -> None:
        """The answer is out. The exchange is over."""
        ...

    def body_blocked(self, *, blocked: bool) -> None:
        """The server takes no more of the request's body for now, or again."""
        ...


class ClientIdentity(Protocol):
    """Whoever the reply is for. Exactly one of the last four is called, once."""

    def own_headers(self) -> Mapping[str, str]: ...

    def reply_begins(self) -> None:
        """From here on bytes are out."""
        ...

    def request_blocked(self, *, blocked: bool) -> None:
        """The server takes no more of the request for now, or again."""
        ...

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        """No byte is out. `stale`: a connection that was used before had been closed already."""
        ...

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        """No byte is out, and asking again would not help. `hangs`: the copy may not answer others either."""
        ...

    def reply_broken(self, error: RouterError, *, keep: bool, died: bool) -> None:
        """Bytes are out, and the answer was ended with an error or cut. `keep`: it ended as whole as any other."""
        ...

    def reply_done(self, *, reusable: bool, keep: bool, died: bool) -> None:
        """The last byte is out. `died`: the answer says, or shows, that its runner died."""
        ...
