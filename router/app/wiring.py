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
from router.api.app import ApiServer
from router.api.context import ApiContext, Limits
from router.app.hardware import Hardware, detect_hardware, instance_plan
from router.config.policy import policy_of, warm_models
from router.config.settings import ConfigError, Settings
from router.control.controller import Controller
from router.control.effects import Effects
from router.control.poller import PollIntervals, StatePoller
from router.domain.events import FootprintsLoaded, InstanceChanged
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec
from router.domain.model_names import canonical
from router.domain.snapshot import Snapshot
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import OllamaClient
from router.engines.ollama.driver import OllamaDriver
from router.engines.ollama.endpoint_support import EndpointSupport
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
from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import ANY, substitutes
from router.observability.access_log import AccessLog
from router.observability.decision_log import DecisionLog
from router.observability.logging import RequestLines, configure_logs, writes_json
from router.observability.metrics import FleetMetricsCollector, Metrics
from router.proxy.context import ClientTimeouts
from router.proxy.server import ProxyServer, proxy_factory
from router.scheduler.dispatcher import Dispatcher
from router.storage.footprint_store import FootprintStore
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
        around = await asyncio.to_thread(detect_hardware, settings)
        for orphan in await asyncio.to_thread(orphan_reaper.reap_orphans, str(settings.state_directory)):
            log.warning("swept", pid=orphan.pid, instance=orphan.instance, command=orphan.command)
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
    controller: Controller
    supervisor: Supervisor
    state_poller: StatePoller
    api_server: ApiServer
    proxy: ProxyServer
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
                watching = tasks.create_task(self.state_poller.run(), name="watcher")
                relaying = tasks.create_task(self.proxy.run(), name="relay")
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
        await asyncio.get_running_loop().create_server(self.proxy, sock=listener, ssl=self.tls)
        host, port = listener.getsockname()[:2]
        log = structlog.get_logger("router")
        url = endpoint_url("http" if self.tls is None else "https", host, port)
        log.info("listening", url=url, **({"emulated": self.title} if self.title else {}))

    async def _close(self, at_once: asyncio.Event) -> None:
        """Drains, then stops the servers, then closes what connections are left."""
        log = structlog.get_logger("router")
        seconds = self.settings.server.drain_timeout_seconds
        log.info("draining", drain_timeout_seconds=seconds)
        self.controller.begin_shutdown()
        self.supervisor.drain_all()
        self.proxy.drain()
        if not await _first(self.api_server.drained(), at_once, seconds):
            log.warning("requests_cut")
        if at_once.is_set():
            self.supervisor.kill_all()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(self.supervisor.stop_all())
            hurrying = group.create_task(self._kill_when(at_once))
            await stopping
            hurrying.cancel()
        await self.library.shutdown(timeout=1.0)
        await self.proxy.close()
        await self.api_server.close()
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
async def _built(settings: Settings, around: Hardware, tls: ssl.SSLContext | None) -> AsyncGenerator[_Router]:
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
        gpus = await poller.read()
        plan = instance_plan(settings, around.models_directory)
        policy = policy_of(settings, gpus, on_demand_like(plan))
        dispatcher = Dispatcher(policy, estimate_bytes)
        observer = DecisionLog(metrics)

        def snapshot() -> Snapshot:
            return dispatcher.snapshot(time.monotonic())

        writing = asyncio.Lock()
        catalog = Catalog(lambda: stores_of(snapshot().instances.values(), client_for), time.monotonic)

        def changed(event: InstanceChanged) -> None:
            controller.post(event)

        def poll_gpus() -> None:
            state_poller.poll_gpus()

        supervisor = Supervisor(_supervisor_config(settings, around), changed)
        loader = OllamaDriver(client_for, catalog, snapshot, writing)
        footprints = FootprintStore(settings.state_directory / "footprints.json")
        driver = _carrier(loader, supervisor, plan, poll_gpus, footprints)
        async with Controller(dispatcher, driver, time.monotonic, (observer,)) as controller:
            metrics.registry.register(FleetMetricsCollector(controller.snapshot, lambda: len(controller.waiting())))
            context = _context(settings, controller, catalog, session, writing)
            intervals = PollIntervals(
                settings.poll.gpu_seconds, settings.poll.residency_seconds, settings.poll.catalog_seconds
            )
            state_poller = StatePoller(
                poller, catalog, client_for, controller.snapshot, controller.post, controller.now, intervals,
                warm_models(policy), loader.clear_leftovers,
            )  # fmt: skip
            try:
                controller.post(FootprintsLoaded(footprints.read()))
                await state_poller.read_gpus()
                for spec in _instances(gpus, plan):
                    supervisor.add(spec)
                access = AccessLog(metrics, controller.now, *([lines] if lines is not None else []))
                origins = _origins(settings)
                debug = settings.server.debug_headers
                api_server = ApiServer(context, origins, metrics, access, around.title, debug)
                library = _library(api_server)
                proxy = proxy_factory(
                    context, origins, access, library, _client_timeouts(settings), debug_headers=debug
                )
                yield _Router(
                    settings, controller, supervisor, state_poller, api_server, proxy, library, tls, around.title
                )
            finally:
                if lines is not None:
                    lines.flush()
                await catalog.close()
                await poller.close()


def _instances(gpus: tuple[Gpu, ...], plan: InstancePlan) -> tuple[InstanceSpec, ...]:
    try:
        return plan_instances(gpus, plan, free_ports(ports_needed(gpus, plan)))
    except (PlanError, NoFreePort) as error:
        raise ConfigError([str(error)]) from error


def _carrier(
    loader: OllamaDriver,
    supervisor: Supervisor,
    plan: InstancePlan,
    poll_gpus: Callable[[], None],
    footprints: FootprintStore,
) -> Effects:
    def start(spec: InstanceSpec) -> None:
        given = [urlsplit(view.spec.url).port or 0 for view in supervisor.views]
        try:
            (port,) = free_ports(1, avoid=given)
        except OSError as error:  # no port, or no file to look for one with
            supervisor.refuse(spec, f"no port for it: {error}")
            return
        supervisor.add(on_demand_instance(spec, plan, port))

    return Effects(loader, start, supervisor.retire, poll_gpus, footprints.remember)


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


def _library(api_server: ApiServer) -> web.Server:
    """aiohttp, for all that the relay hands over; limits on heads and idle connections are the relay's."""
    return web.Server(
        api_server.handle,
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


def _client_timeouts(settings: Settings) -> ClientTimeouts:
    server = settings.server
    return ClientTimeouts(
        head_seconds=server.head_timeout_seconds,
        body_seconds=server.body_timeout_seconds,
        idle_seconds=server.connection_timeout_seconds,
    )


def _context(
    settings: Settings, controller: Controller, catalog: Catalog, session: aiohttp.ClientSession, writing: asyncio.Lock
) -> ApiContext:
    limits = Limits(
        max_body_bytes=settings.server.max_body_bytes,
        queue_timeout_seconds=settings.queue.timeout_seconds,
        first_byte_timeout_seconds=settings.stream.first_byte_timeout_seconds,
        idle_timeout_seconds=settings.stream.idle_timeout_seconds,
    )
    removing = set[str]()
    return ApiContext(
        controller=controller,
        catalog=catalog,
        session=session,
        limits=limits,
        rules=_rules(settings, removing),
        endpoint_support=EndpointSupport(session),
        writing=writing,
        removing=removing,
    )


def _rules(settings: Settings, removing: set[str]) -> ModelRules:
    named = {name if name == ANY else canonical(name): one for name, one in settings.models.items()}
    fallbacks = {name: (one.to, one.reasons) for name, one in settings.fallbacks.items()}
    return ModelRules(
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


def _supervisor_config(settings: Settings, around: Hardware) -> SupervisorConfig:
    return SupervisorConfig(
        command=around.command,
        state_directory=str(Path(settings.state_directory)),
        run_id=orphan_reaper.run_id(),
        environment=around.environment,
        start_timeout_seconds=settings.ollama.start_timeout_seconds,
    )
