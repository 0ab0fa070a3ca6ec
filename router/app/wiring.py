"""The composition root: builds everything from the settings, wires it, and owns start and stop.

`serve` returns the process's exit code. SIGTERM, Ctrl-C or a closed terminal drains: new requests are refused, running
ones may end until `server.drain_timeout_seconds`, then the servers are stopped. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import structlog
from aiohttp import web

from router.admission.origin_check import OriginPolicy, Origins, is_loopback, machine_names
from router.api.app import Gateway
from router.api.context import GatewayContext, Limits
from router.app.hardware import Surroundings, instance_plan, look_around
from router.config.policy import policy_of, warm_models
from router.config.settings import ConfigError, Settings
from router.control.controller import Engine
from router.control.effects import FleetCarrier
from router.control.poller import Pace, Watcher
from router.domain.events import FootprintsKnown, InstanceChanged
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.domain.model_names import canonical
from router.domain.snapshot import Snapshot
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import OllamaClient
from router.engines.ollama.driver import OllamaDriver
from router.engines.ollama.endpoint_support import Abilities
from router.engines.ollama.footprint_estimator import estimate_bytes
from router.engines.ollama.instance_plan import (
    InstancePlan,
    PlanError,
    on_demand_instance,
    on_demand_like,
    plan_instances,
    ports_needed,
)
from router.engines.ollama.model_listing import stores_of
from router.gpu.poller import GpuPoller
from router.http1.parser import HEAD_BYTES_MAX
from router.llm_api.inference_request import Rules
from router.llm_api.model_aliases import ANY, substitutes
from router.observability.access_log import AccessLog
from router.observability.logging import RequestLines, configure_logs, writes_json
from router.observability.metrics import EngineObserver, FleetCollector, Metrics
from router.proxy.context import Patience
from router.proxy.server import Relay, relay_over
from router.scheduler.dispatcher import Dispatcher
from router.storage.footprint_store import FootprintFile
from router.supervisor import orphan_reaper
from router.supervisor.instance import SupervisorConfig
from router.supervisor.ports import NoFreePort, free_ports
from router.supervisor.supervisor import Supervisor

_LISTEN_BACKLOG = 4096
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

EXIT_OK = 0
EXIT_FAILED = 1


async def serve(settings: Settings) -> int:
    """Runs the router until it is told to stop. ConfigError for what only shows when it is tried."""
    configure_logs(settings.log.format, settings.log.level)
    log = structlog.get_logger("router")
    tls = _tls(settings)
    try:
        listener = _listen(settings)
    except OSError as error:
        raise ConfigError([_port_words(settings, error)]) from error
    with contextlib.closing(listener):
        around = await asyncio.to_thread(look_around, settings)
        for swept in await asyncio.to_thread(orphan_reaper.sweep, str(settings.state_directory)):
            log.warning("swept", pid=swept.pid, instance=swept.instance, command=swept.command)
        async with _built(settings, around, tls) as router:
            return await router.run(listener)


def _listen(settings: Settings) -> socket.socket:
    """Bound before anything is started, so that a port that is taken ends the start at once."""
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_LISTEN_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _port_words(settings: Settings, error: OSError) -> str:
    host, port = settings.server.host, settings.server.port
    if error.errno != errno.EADDRINUSE:
        return f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror or error}"
    return (
        f"server.port: port {port} on {host} is taken, perhaps by the stock Ollama service: free it with "
        f"`sudo systemctl disable --now ollama`, or move the router with `--port {port + 1}`"
    )


@dataclass(frozen=True, slots=True)
class _Router:
    """Everything that runs."""

    settings: Settings
    engine: Engine
    supervisor: Supervisor
    watcher: Watcher
    gateway: Gateway
    relay: Relay
    library: web.Server
    tls: ssl.SSLContext | None
    title: str

    async def run(self, listener: socket.socket) -> int:
        """Until a signal has come and all is stopped."""
        stopping, at_once = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, _signalled, stopping, at_once)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            # More than one may come of a terminal that is closed.
            loop.add_signal_handler(signal.SIGHUP, stopping.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                supervising = tasks.create_task(self.supervisor.run(), name="supervisor")
                watching = tasks.create_task(self.watcher.run(), name="watcher")
                relaying = tasks.create_task(self.relay.run(), name="relay")
                await self._open(listener)
                await stopping.wait()
                await self._close(at_once)
                watching.cancel()
                relaying.cancel()
                await supervising
        finally:
            for number in (*_STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
        return EXIT_OK

    async def _open(self, listener: socket.socket) -> None:
        # What is there now stays: the collector need not walk it at every turn, which is a twentieth of a request.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        await asyncio.get_running_loop().create_server(self.relay, sock=listener, ssl=self.tls)
        host, port = listener.getsockname()[:2]
        log = structlog.get_logger("router")
        url = endpoint_url("http" if self.tls is None else "https", host, port)
        log.info("listening", url=url, **({"emulated": self.title} if self.title else {}))

    async def _close(self, at_once: asyncio.Event) -> None:
        """Drains, then stops the servers, then closes what connections are left."""
        log = structlog.get_logger("router")
        seconds = self.settings.server.drain_timeout_seconds
        log.info("draining", drain_timeout_seconds=seconds)
        self.engine.begin_shutdown()
        self.supervisor.drain_all()
        self.relay.drain()
        if not await _first(self.gateway.drained(), at_once, seconds):
            log.warning("requests_cut")
        if at_once.is_set():
            self.supervisor.kill_all()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(self.supervisor.stop_all())
            hurrying = group.create_task(self._kill_when(at_once))
            await stopping
            hurrying.cancel()
        await self.library.shutdown(timeout=1.0)
        await self.relay.close()
        await self.gateway.close()
        log.info("stopped")

    async def _kill_when(self, at_once: asyncio.Event) -> None:
        await at_once.wait()
        self.supervisor.kill_all()


def endpoint_url(scheme: str, host: str, port: int) -> str:
    """As a client takes it: an address of IPv6 stands in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _signalled(stopping: asyncio.Event, at_once: asyncio.Event) -> None:
    if stopping.is_set():
        at_once.set()
    stopping.set()


async def _first(work: object, event: asyncio.Event, seconds: float) -> bool:
    """Whether the work ended before the event was set and the time was over."""
    async with asyncio.TaskGroup() as group:
        working = group.create_task(_awaited(work))
        waiting = group.create_task(_awaited(event.wait()))
        await asyncio.wait({working, waiting}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
        working.cancel()
        waiting.cancel()
    return done


async def _awaited(work: object) -> None:
    await work  # type: ignore[misc]


@contextlib.asynccontextmanager
async def _built(settings: Settings, around: Surroundings, tls: ssl.SSLContext | None) -> AsyncGenerator[_Router]:
    """Wires everything; leaving ends what was started."""
    metrics = Metrics()
    lines = RequestLines(settings.log.level) if writes_json(settings.log.format) else None
    clients: dict[str, OllamaClient] = {}
    # Exact bytes are relayed: nothing is unpacked, no connection waits for another, cookies are the client's.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), timeout=_NO_TIMEOUT
    ) as session:

        def client_for(url: str) -> OllamaClient:
            if url not in clients:
                clients[url] = OllamaClient(session, url)
            return clients[url]

        poller = GpuPoller(around.reader)
        cards = await poller.read()
        plan = instance_plan(settings, around.models_directory)
        policy = policy_of(settings, cards, on_demand_like(plan))
        dispatcher = Dispatcher(policy, estimate_bytes)
        observer = EngineObserver(metrics)

        def snapshot() -> Snapshot:
            return dispatcher.snapshot(time.monotonic())

        writing = asyncio.Lock()
        catalog = Catalog(lambda: stores_of(snapshot().instances.values(), client_for), time.monotonic)

        def changed(event: InstanceChanged) -> None:
            engine.post(event)

        def look_at_gpus() -> None:
            watcher.look_at_gpus()

        supervisor = Supervisor(_supervisor_config(settings, around), changed)
        loader = OllamaDriver(client_for, catalog, snapshot, writing)
        footprints = FootprintFile(settings.state_directory / "footprints.json")
        driver = _carrier(loader, supervisor, plan, look_at_gpus, footprints)
        async with Engine(dispatcher, driver, time.monotonic, (observer,)) as engine:
            metrics.registry.register(FleetCollector(engine.snapshot, lambda: len(engine.waiting())))
            context = _context(settings, engine, catalog, session, writing)
            pace = Pace(settings.poll.gpu_seconds, settings.poll.residency_seconds, settings.poll.catalog_seconds)
            watcher = Watcher(
                poller, catalog, client_for, engine.snapshot, engine.post, engine.now, pace, warm_models(policy),
                loader.clear_leftovers,
            )  # fmt: skip
            try:
                engine.post(FootprintsKnown(footprints.read()))
                await watcher.read_gpus()
                for spec in _instances(cards, plan):
                    supervisor.add(spec)
                access = AccessLog(metrics, engine.now, *([lines] if lines is not None else []))
                origins = _origins(settings)
                debug = settings.server.debug_headers
                gateway = Gateway(context, origins, metrics, access, around.title, debug)
                library = _library(gateway)
                relay = relay_over(context, origins, access, library, _patience(settings), debug_headers=debug)
                yield _Router(settings, engine, supervisor, watcher, gateway, relay, library, tls, around.title)
            finally:
                if lines is not None:
                    lines.flush()
                await catalog.close()
                await poller.close()


def _instances(cards: tuple[Gpu, ...], plan: InstancePlan) -> tuple[InstanceSpec, ...]:
    try:
        return plan_instances(cards, plan, free_ports(ports_needed(cards, plan)))
    except (PlanError, NoFreePort) as error:
        raise ConfigError([str(error)]) from error


def _carrier(
    loader: OllamaDriver,
    supervisor: Supervisor,
    plan: InstancePlan,
    look_at_gpus: Callable[[], None],
    footprints: FootprintFile,
) -> FleetCarrier:
    def start(spec: InstanceSpec) -> None:
        given = [urlsplit(view.spec.url).port or 0 for view in supervisor.views]
        try:
            (port,) = free_ports(1, avoid=given)
        except OSError as error:  # no port, or no file to look for one with
            supervisor.refuse(spec, f"no port for it: {error}")
            return
        supervisor.add(on_demand_instance(spec, plan, port))

    return FleetCarrier(loader, start, supervisor.retire, look_at_gpus, footprints.remember)


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


def _library(gateway: Gateway) -> web.Server:
    """aiohttp, for all that the relay hands over; limits on heads and idle connections are the relay's."""
    return web.Server(
        gateway.handle,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=7 * 86400.0,
        max_line_size=HEAD_BYTES_MAX,
        max_field_size=HEAD_BYTES_MAX,
    )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """How the endpoint speaks TLS; None where it does not. ConfigError where a file cannot be used."""
    certificate, key = settings.server.tls_certificate, settings.server.tls_key
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one too
        raise ConfigError([f"server.tls_certificate, server.tls_key: {certificate}, {key}: {error}"]) from error
    return context


def _patience(settings: Settings) -> Patience:
    server = settings.server
    return Patience(
        head_seconds=server.head_timeout_seconds,
        body_seconds=server.body_timeout_seconds,
        idle_seconds=server.connection_timeout_seconds,
    )


def _context(
    settings: Settings, engine: Engine, catalog: Catalog, session: aiohttp.ClientSession, writing: asyncio.Lock
) -> GatewayContext:
    limits = Limits(
        max_body_bytes=settings.server.max_body_bytes,
        queue_timeout_seconds=settings.queue.timeout_seconds,
        first_byte_timeout_seconds=settings.stream.first_byte_timeout_seconds,
        idle_timeout_seconds=settings.stream.idle_timeout_seconds,
    )
    removing = set[str]()
    return GatewayContext(
        engine=engine,
        catalog=catalog,
        session=session,
        limits=limits,
        rules=_rules(settings, removing),
        abilities=Abilities(session),
        writing=writing,
        removing=removing,
    )


def _rules(settings: Settings, removing: set[str]) -> Rules:
    named = {name if name == ANY else canonical(name): one for name, one in settings.models.items()}
    fallbacks = {name: (one.to, one.reasons) for name, one in settings.fallbacks.items()}
    return Rules(
        default_context_length=settings.ollama.context_length,
        substitutes=substitutes(settings.aliases, fallbacks, listed=settings.server.list_aliases),
        passes={name: one.options == "pass" for name, one in named.items()},
        cloud=settings.ollama.cloud,
        heartbeat_seconds=settings.stream.heartbeat_seconds,
        removing=removing,
    )


def _origins(settings: Settings) -> OriginPolicy:
    names = {*machine_names(), *(name.lower() for name in settings.server.allowed_hosts)}
    return OriginPolicy(Origins(settings.server.cors_origins), is_loopback(settings.server.host), names)


def _supervisor_config(settings: Settings, around: Surroundings) -> SupervisorConfig:
    return SupervisorConfig(
        command=around.command,
        state_directory=str(Path(settings.state_directory)),
        run_id=orphan_reaper.run_id(),
        environment=around.environment,
        start_timeout_seconds=settings.ollama.start_timeout_seconds,
    )
