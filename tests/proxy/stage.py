"""The relay alone: a scripted engine, catalog and books, and upstream servers whose every byte the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import cast

from aiohttp import web

from router.admission.origin_check import OriginPolicy, Origins
from router.admission.pipeline import AdmissionPipeline, admission_pipeline
from router.domain.actions import Grant, Reject
from router.domain.events import Event
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.model import NO_MODEL, BlobDigest, ModelFacts
from router.domain.request import Ticket, TicketId
from router.errors import NoInstance
from router.http1.via import Via
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import RouteTable
from router.observability.request_record import RequestRecord
from router.proxy.context import ProxyContext, Tasks
from router.proxy.server import ProxyServer
from router.proxy.upstream_pool import Pool
from router.scheduler.queue.wait_estimate import WaitEstimate
from tests.support.rawhttp import Address
from tests.support.waiting import eventually

MODEL = replace(NO_MODEL, name="tiny:latest", blob=BlobDigest("sha256:tiny"))
LIMITS = RequestLimits(
    max_body_bytes=2**20, queue_timeout_seconds=30.0, first_byte_timeout_seconds=30.0, idle_timeout_seconds=30.0
)
OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"done":true}'


class Turn:
    """One request at an upstream server, and the way to answer it."""

    def __init__(self, number: int, connection: int, head: bytes, body: bytes, transport: asyncio.Transport) -> None:
        self.number = number
        """Counted over the whole server, from 1."""
        self.connection = connection
        self.head = head
        self.body = body
        self.transport = transport

    async def write(self, *pieces: bytes) -> None:
        """Each piece on its own, as far as the loop can keep them apart."""
        for piece in pieces:
            self.transport.write(piece)
            for _ in range(3):
                await asyncio.sleep(0)


Script = Callable[[Turn], Awaitable[None]]


def replying(*pieces: bytes) -> Script:
    """Writes these and keeps the connection."""

    async def script(turn: Turn) -> None:
        await turn.write(*pieces)

    return script


def by_turn(*scripts: Script) -> Script:
    """The first request by the first script, and so on; the last for all further ones."""

    async def script(turn: Turn) -> None:
        await scripts[min(turn.number, len(scripts)) - 1](turn)

    return script


async def closing(turn: Turn) -> None:
    """Closes without a byte."""
    turn.transport.close()


def then_closing(*pieces: bytes) -> Script:
    """Writes these, then closes."""

    async def script(turn: Turn) -> None:
        await turn.write(*pieces)
        turn.transport.close()

    return script


def then_waiting(*pieces: bytes) -> Script:
    """Writes these, then says nothing more until its connection goes."""

    async def script(turn: Turn) -> None:
        await turn.write(*pieces)
        await asyncio.Event().wait()

    return script


@dataclass(slots=True)
class Upstream:
    """A server that answers each request by its script. A connection that goes cancels what runs on it."""

    script: Script = field(default_factory=lambda: replying(OK))
    turns: list[Turn] = field(default_factory=list[Turn])
    connections: int = 0
    open: int = 0
    cancelled: int = 0
    """Scripts that were running when their connection went."""
    received_bytes: int = 0
    transports: list[asyncio.Transport] = field(default_factory=list[asyncio.Transport])
    url: str = ""


class _Serving(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._data = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._upstream.transports.append(self._transport)
        self._upstream.connections += 1
        self._upstream.open += 1
        self._number = self._upstream.connections

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._upstream.received_bytes += len(data)
        head, blank, rest = self._data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if blank and len(rest) >= length:
            self._data = rest[length:]
            upstream = self._upstream
            turn = Turn(len(upstream.turns) + 1, self._number, head + blank, rest[:length], self._transport)
            upstream.turns.append(turn)
            self._task = asyncio.get_running_loop().create_task(self._answer(turn))

    async def _answer(self, turn: Turn) -> None:
        await self._upstream.script(turn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.open -= 1
        if self._task is not None and not self._task.done():
            self._upstream.cancelled += 1
            self._task.cancel()


@dataclass(slots=True)
class ScriptedEngine:
    """Grants at once while it has `urls`, in turn; else tickets wait until the test decides."""

    urls: list[str] = field(default_factory=list[str])
    waiting: dict[TicketId, Callable[[Grant | Reject], None]] = field(
        default_factory=dict[TicketId, Callable[[Grant | Reject], None]]
    )
    held: set[TicketId] = field(default_factory=set[TicketId])
    tickets: list[Ticket] = field(default_factory=list[Ticket])
    lost: list[TicketId] = field(default_factory=list[TicketId])
    silent: list[float] = field(default_factory=list[float])
    """Seconds of silence that were reported."""
    failures: list[ReplyFailure] = field(default_factory=list[ReplyFailure])
    """As they were reported."""
    cancelled: int = 0
    posted: list[Event] = field(default_factory=list[Event])
    standing: WaitEstimate | None = None
    """Where every waiting ticket stands."""
    clock: Callable[[], float] = field(default_factory=lambda: asyncio.get_running_loop().time)
    _last: int = 0

    def now(self) -> float:
        return self.clock()

    def new_ticket_id(self) -> TicketId:
        self._last += 1
        return TicketId(self._last)

    def submit(self, ticket: Ticket, decided: Callable[[Grant | Reject], None]) -> None:
        self.tickets.append(ticket)
        self.waiting[ticket.id] = decided
        if self.urls:
            self.grant(ticket.id, self.urls[(len(self.tickets) - 1) % len(self.urls)])

    def grant(self, ticket: TicketId, url: str) -> None:
        decided = self.waiting.pop(ticket)
        self.held.add(ticket)
        decided(Grant(ticket, InstanceName("gpu0"), url, "because", 0, 1))

    def reject(self, ticket: TicketId, code: str) -> None:
        self.waiting.pop(ticket)(Reject(ticket, code, "no room here", retry_after_seconds=7))

    def cancel(self, ticket_id: TicketId) -> None:
        del self.waiting[ticket_id]
        self.cancelled += 1

    def release(
        self,
        ticket_id: TicketId,
        *,
        runner_lost: bool = False,
        output_tokens: int = 0,
        first_byte_at: float | None = None,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> None:
        if failure is not None:
            self.failures.append(failure)
        if silent_seconds:
            self.silent.append(silent_seconds)
        self.held.remove(ticket_id)  # KeyError where a slot is given back twice
        if runner_lost:
            self.lost.append(ticket_id)

    def wait_estimate(self, ticket_id: TicketId) -> WaitEstimate | None:
        return self.standing if ticket_id in self.waiting else None

    def post(self, event: Event) -> None:
        self.posted.append(event)


@dataclass(slots=True)
class ScriptedCatalog:
    """Knows `models`; those of `slow` only to who waits."""

    models: dict[str, ModelFacts] = field(default_factory=lambda: {"tiny": MODEL})
    slow: dict[str, asyncio.Future[ModelFacts | None]] = field(
        default_factory=dict[str, asyncio.Future[ModelFacts | None]]
    )

    def known(self, name: str) -> ModelFacts | None:
        return self.models.get(name)

    async def facts(self, name: str) -> ModelFacts | None:
        if name in self.slow:
            return await asyncio.shield(self.slow[name])
        return self.models.get(name)


class ScriptedAbilities:
    """The servers have every path but `/v1/messages`, which shows only when they are asked."""

    def known(self, view: InstanceView, path: str) -> bool | None:
        return None if path.startswith("/v1/messages") else True

    async def has(self, view: InstanceView, path: str) -> bool:
        await asyncio.sleep(0)
        return not path.startswith("/v1/messages")


@dataclass(slots=True)
class ScriptedBooks:
    running: int = 0
    entries: list[tuple[RequestRecord, int]] = field(default_factory=list[tuple[RequestRecord, int]])

    def began(self) -> None:
        self.running += 1

    def ended(self, record: RequestRecord, method: str, path: str, status: int) -> None:
        self.running -= 1
        self.entries.append((record, status))

    @property
    def statuses(self) -> list[int]:
        return [status for _, status in self.entries]


@dataclass(slots=True)
class Stage:
    """Everything a test looks at."""

    upstream: Upstream
    controller: ScriptedEngine
    catalog: ScriptedCatalog
    request_log: ScriptedBooks
    proxy: ProxyServer
    pool: Pool
    address: Address
    handed: list[str]
    """Paths that the HTTP library was given."""

    @property
    def is_at_rest(self) -> bool:
        """No slot, ticket or request is left over."""
        return not (
            self.controller.held or self.controller.waiting or self.request_log.running or self.pool.opening_count
        )


async def rests(stage: Stage) -> None:
    """Waits until nothing is left over."""
    await eventually(lambda: stage.is_at_rest, what="rest")


async def _library(request: web.BaseRequest, handed: list[str]) -> web.StreamResponse:
    """The other half: echoes bodies, and can answer before a body has come."""
    handed.append(request.path)
    if request.path == "/early":
        return web.Response(text="early", status=403)
    if request.path == "/empty":
        await request.read()
        return web.Response(status=200, headers={"Content-Length": "0"})
    if request.path == "/chunked":
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"one")
        await response.write(b"two")
        await response.write_eof()
        return response
    body = await request.read()
    return web.Response(text=f"{request.method} {request.path} {len(body)}")


VIA = Via("llamayard-test")


def pipeline_with(limits: RequestLimits) -> AdmissionPipeline:
    """As of a router that listens on loopback, with one allowed origin and no GPUs."""
    return admission_pipeline(
        OriginPolicy(Origins(("http://localhost",)), True, frozenset()), limits, dict, RouteTable(), VIA
    )


def make_context(
    controller: ScriptedEngine, catalog: ScriptedCatalog, request_log: ScriptedBooks, pool: Pool
) -> ProxyContext:
    """Over scripts, with no server to fall back on."""

    def nobody() -> InstanceView:
        raise NoInstance("no Ollama instance is ready")

    async def nobody_comes() -> InstanceView:
        return nobody()

    return ProxyContext(
        controller=controller,
        catalog=catalog,
        pool=pool,
        request_log=request_log,
        pipeline=pipeline_with(LIMITS),
        limits=LIMITS,
        rules=ModelRules(default_context_length=8192),
        endpoint_support=ScriptedAbilities(),
        primary=nobody,
        ready_primary=nobody_comes,
        find_model=catalog.facts,
        has_free_slot=lambda _: True,
        debug_headers=False,
        make_handler=asyncio.Protocol,
        table=RouteTable(),
        tasks=Tasks(),
        via=VIA,
    )


@contextlib.asynccontextmanager
async def staged(
    *,
    limits: RequestLimits = LIMITS,
    primary: bool = True,
    elsewhere: bool = False,
    rules: ModelRules = ModelRules(default_context_length=8192),  # noqa: B008
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[Stage]:
    """A relay that listens on loopback, in front of one upstream server. `elsewhere`: another replica serves."""
    loop = asyncio.get_running_loop()
    upstream = Upstream()
    server = await loop.create_server(lambda: _Serving(upstream), "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    controller, catalog, request_log, handed = ScriptedEngine([upstream.url]), ScriptedCatalog(), ScriptedBooks(), []

    def first() -> InstanceView:
        if not primary:
            raise NoInstance("no Ollama instance is ready")
        return InstanceView(InstanceSpec(InstanceName("gpu0"), (), upstream.url), InstanceState.READY)

    async def first_ready() -> InstanceView:
        return first()

    quiet = logging.Logger("quiet")  # clients that leave are what these tests are about
    quiet.addHandler(logging.NullHandler())
    library = web.Server(
        lambda request: _library(request, handed),
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        logger=quiet,
    )
    pool = Pool(5.0, controller.now)
    context = replace(
        make_context(controller, catalog, request_log, pool),
        pipeline=pipeline_with(limits),
        limits=limits,
        rules=rules,
        endpoint_support=ScriptedAbilities(),
        primary=first,
        ready_primary=first_ready,
        make_handler=library,
        serves_elsewhere=lambda _model, _instance: elsewhere,
    )
    proxy = ProxyServer(context)
    front = await loop.create_server(proxy, "127.0.0.1", 0, ssl=tls)
    address = Address("127.0.0.1", front.sockets[0].getsockname()[1])
    watching = loop.create_task(proxy.run())
    try:
        yield Stage(upstream, controller, catalog, request_log, proxy, pool, address, handed)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await proxy.close()
        await library.shutdown(0.1)
        front.close()
        server.close()
