"""What every connection of the relay shares: the engine, names of models, ways to the servers, limits, and the books.

A plain value handed to each connection's constructor. What it asks of the rest of the router stands here as small
protocols, so that the relay can be tested over a scripted engine.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from router.admission.client_identity import ClientIdentity
from router.admission.origin_check import Answer, OriginPolicy
from router.api.context import Limits
from router.domain.actions import Grant, Reject
from router.domain.events import Event
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceView
from router.domain.model import ModelFacts
from router.domain.request import Ticket, TicketId
from router.engines.ollama.endpoint_support import is_young
from router.http1.headers import begun_request, request_id
from router.http1.parser import RequestHead
from router.llm_api.body_reader import refuse_encoded
from router.llm_api.form_data import is_form
from router.llm_api.inference_request import ModelRules
from router.llm_api.routes import Kind, Route, RouteTable
from router.observability.request_record import RequestRecord
from router.proxy.header_cache import HeaderCache
from router.proxy.plan_cache import CachedPlan, Key
from router.proxy.request_body import too_large
from router.proxy.upstream_pool import Pool
from router.scheduler.lru import put
from router.scheduler.queue.wait_estimate import WaitEstimate

_SERVERS_MAX = 64
_REMEMBERED_MAX = 256
_REMEMBERED_BYTES_MAX = 256
_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class SlotQueue(Protocol):
    """The engine, as far as the relay uses it. All of it is synchronous."""

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
    ) -> None: ...

    def wait_estimate(self, ticket_id: TicketId) -> WaitEstimate | None: ...

    def post(self, event: Event) -> None: ...


class ModelCatalog(Protocol):
    """The catalog, as far as the relay uses it."""

    def known(self, name: str) -> ModelFacts | None: ...

    async def facts(self, name: str) -> ModelFacts | None: ...


class EndpointSupport(Protocol):
    """What the servers can, as far as it differs between versions."""

    def known(self, view: InstanceView, path: str) -> bool | None: ...

    async def has(self, view: InstanceView, path: str) -> bool: ...


class RequestLog(Protocol):
    """The access log: each request begins and ends in it exactly once."""

    def began(self) -> None: ...

    def ended(self, info: RequestRecord, method: str, path: str, status: int) -> None: ...


class Listener(Protocol):
    """Whoever accepts the connections."""

    closing: bool
    """No answer may promise that its connection goes on."""
    long_bodies: int
    """How many there were so far."""

    def opened(self, connection: asyncio.Protocol) -> None: ...

    def lost(self, connection: asyncio.Protocol) -> None: ...


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """How long a client's side of a connection may take, in seconds."""

    head_seconds: float = 30.0
    """From a head's first byte to its last."""
    body_seconds: float = 60.0
    """Between two pieces of a request's body."""
    idle_seconds: float = 3600.0
    """Between two requests on a connection; long, because clients such as Go's keep theirs for as long."""
    half_closed_seconds: float = 2.0
    """How long the HTTP library may still take to answer a client that will send no more."""
    slot_seconds: float = 2.0
    """How long a body may still come once its request holds a slot: a slow sender keeps none."""
    linger_seconds: float = 5.0
    """How long the rest of a refused request is still read, so that its sender sees the answer and not a reset."""


class Tasks:
    """Owns the relay's few tasks: looking up models that are not known yet."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Ids:
    """New request ids: random once for this life of the router, then counted."""

    __slots__ = ("_last", "_prefix")

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(10)
        self._last = 0

    def __call__(self) -> str:
        self._last += 1
        return f"{self._prefix}{self._last:012x}"


class HeadInfo:
    """What has been made of one head of a request to the relay's own routes."""

    __slots__ = (
        "begun", "client_identity", "is_form", "is_good", "is_young", "path", "request_id", "route", "usual",
        "wants_reason",
    )  # fmt: skip

    def __init__(self, route: Route, path: str, *, is_form: bool) -> None:
        self.route = route
        self.path = path
        """Decoded, without the query."""
        self.is_young = is_young(path)
        self.is_form = is_form
        """Whether the body is said to be one."""
        self.request_id: str | None = None
        self.wants_reason = False
        self.is_good = False
        """Whether nothing in it but its length can end the request any more."""
        self.client_identity: ClientIdentity | None = None
        self.begun: dict[str, bytes] = {}
        """The head as it goes on, but for its framing, by the server's URL."""
        self.usual: dict[Key, CachedPlan] = {}
        """What came of requests with it, by what their bodies said."""

    def begin(self, head: RequestHead, url: str, pool: Pool) -> bytes:
        """The head as it goes on to that server, but for its framing; remembered for the next."""
        begun = begun_request(head.method, head.target, head.headers, pool.authority(url))
        put(self.begun, url, begun, _SERVERS_MAX)
        return begun


@dataclass(frozen=True, slots=True)
class ProxyContext:
    controller: SlotQueue
    catalog: ModelCatalog
    pool: Pool
    request_log: RequestLog
    origins: OriginPolicy
    limits: Limits
    rules: ModelRules
    endpoint_support: EndpointSupport
    primary: Callable[[], InstanceView]
    """The one instance for requests that cannot be routed. NoInstance, ShuttingDown: none may be used."""
    gpus: Callable[[], Mapping[GpuUuid, Gpu]]
    has_free_slot: Callable[[ModelFacts], bool]
    """Whether a copy of the model, with no options of its own, could serve a request now. Informs, gates nothing."""
    debug_headers: bool
    make_handler: Callable[[], asyncio.Protocol]
    """A new protocol of the HTTP library, for requests that the relay hands over."""
    timeouts: ClientTimeouts
    table: RouteTable
    tasks: Tasks
    new_id: Callable[[], str] = field(default_factory=Ids)
    good_hosts: set[str] = field(default_factory=set[str])
    """Host headers that were found good, to be judged no more."""
    heads: HeaderCache = field(default_factory=HeaderCache)
    leased: dict[bytes, tuple[Route, str]] = field(default_factory=dict[bytes, tuple[Route, str]])
    """Targets that were found to be the relay's own."""

    def leased_route(self, head: RequestHead) -> HeadInfo | None:
        """The route, with the decoded path, of a request that the relay answers itself."""
        if head.method != b"POST":
            return None
        known = self.leased.get(head.target) or self._find(head)
        if known is None:
            return None
        head.notes = notes = HeadInfo(*known, is_form=is_form(head.text("content-type")))
        notes.wants_reason = self.debug_headers or (head.text("x-llamayard-debug") or "") not in ("", "0", "false")
        notes.request_id = head.text("x-request-id")
        return notes

    def _find(self, head: RequestHead) -> tuple[Route, str] | None:
        if not head.target.startswith(b"/"):
            head.target = _ABSOLUTE.sub(b"", head.target, count=1)  # RFC 9112, 3.2.2
        target = head.target
        path = unquote(target.partition(b"?")[0], errors="replace")
        route = self.table.find(path)
        if route is None or route.kind is not Kind.LEASED:
            return None
        if len(self.leased) < _REMEMBERED_MAX and len(target) < _REMEMBERED_BYTES_MAX:
            self.leased[target] = (route, path)
        return route, path

    def judge(self, head: RequestHead, notes: HeadInfo, info: RequestRecord) -> Answer | None:
        """What ends the request before its body is read, if anything does. Where `notes.is_good`, only its length can.

        Raises:
            RouterError: it is refused in the form of its API.
        """
        host, origin = head.text("host") or "", head.text("origin")
        if origin is not None or host not in self.good_hosts:
            verdict = self.origins.judge("POST", host, origin, notes.route.methods)
            info.cors = verdict.headers
            if verdict.answer is not None:
                return verdict.answer
            if origin is None and len(self.good_hosts) < _REMEMBERED_MAX and len(host) < _REMEMBERED_BYTES_MAX:
                self.good_hosts.add(host)
        refuse_encoded(notes.path, head.text("content-encoding"))
        if head.length is not None and head.length > self.limits.max_body_bytes:
            raise too_large(self.limits.max_body_bytes)
        notes.is_good = origin is None
        return None

    def info(self, notes: HeadInfo, client: str) -> RequestRecord:
        given = notes.request_id
        number = self.new_id() if given is None else request_id(given, self.new_id)
        return RequestRecord(number, client, notes.route.path, self.controller.now(), notes.wants_reason)
