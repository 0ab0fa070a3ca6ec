"""The running router: start, stop and signals.

SIGTERM, Ctrl-C or a closed terminal drains: new requests are refused, running ones may end until
`server.drain_timeout_seconds`, then the servers are stopped. A second signal ends what runs at once. Under a service
manager, which has no terminal, SIGHUP reloads the configuration instead.

With `ollama.adopt`, SIGTERM leaves the servers to the next router. Where the service manager holds the listening
socket, connections wait in it for that router, and the requests that this one has, waiting ones included, are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass

import structlog
from aiohttp import web

from router.api.app import ApiServer
from router.api.context import SHUTDOWN_RETRY_AFTER_SECONDS, Cutoff
from router.app.access_keys import KeyWatcher
from router.app.listening import Listener
from router.app.reload import Reloader
from router.app.service_manager import ServiceManager
from router.control.controller import Controller
from router.control.poller import StatePoller
from router.domain.instance import InstanceName, InstanceState
from router.errors import ShuttingDown
from router.proxy.server import ProxyServer
from router.supervisor.supervisor import Supervisor

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ADOPTED_READY_SECONDS = 15.0
"""How long the port stays closed at the start for servers that were adopted to answer."""
_NEW_CONNECTIONS_SECONDS = 0.5
"""How long clients that had just connected may take to send their request before this router ends."""


class _Stop:
    """What signals have asked for."""

    def __init__(self, *, keeps_servers: bool) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()
        self._keeps_servers = keeps_servers
        self.leaves_servers = False
        """Whether the servers are left to the next router."""

    def signal(self, number: signal.Signals) -> None:
        if self.asked.is_set() and number in _STOP_SIGNALS:
            self.at_once.set()
        elif not self.asked.is_set():
            self.leaves_servers = self._keeps_servers and number is signal.SIGTERM
        self.asked.set()


@dataclass(frozen=True, slots=True)
class AdminListener:
    """What serves metrics and status where they have a listener of their own."""

    proxy: ProxyServer
    library: web.Server

    async def run(self, listener: socket.socket) -> None:
        """Serves until it is cancelled."""
        loop = asyncio.get_running_loop()
        is_unix = listener.family is socket.AF_UNIX
        open_server = loop.create_unix_server if is_unix else loop.create_server
        server = await open_server(self.proxy, sock=listener)  # uvloop closes a server that nobody holds
        try:
            await self.proxy.run()
        finally:
            server.close()


@dataclass(frozen=True, slots=True)
class Router:
    """All components that run until a signal stops them."""

    controller: Controller
    supervisor: Supervisor
    state_poller: StatePoller
    api_server: ApiServer
    proxy: ProxyServer
    library: web.Server
    tls: ssl.SSLContext | None
    cutoff: Cutoff
    title: str
    """`EMULATED rig 2x3090`, or "" for real GPUs."""
    drain_timeout_seconds: float
    key_watcher: KeyWatcher
    admin: AdminListener
    reloader: Reloader
    service_manager: ServiceManager
    keeps_servers: bool
    """Whether SIGTERM leaves the servers to the next router."""
    adopted: tuple[InstanceName, ...]
    """Instances that begin with a server of an earlier router."""

    async def run(self, listener: Listener, admin_listener: socket.socket | None = None) -> None:
        """Serves on the listeners; returns when a signal has come and everything is stopped."""
        stop = _Stop(keeps_servers=self.keeps_servers)
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, stop.signal, number)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            # A closed terminal may send several; none of them means "at once".
            loop.add_signal_handler(signal.SIGHUP, stop.signal, signal.SIGHUP)
        try:
            async with asyncio.TaskGroup() as tasks:
                if self.service_manager.is_present:
                    loop.add_signal_handler(signal.SIGHUP, self._reload, tasks)
                watchdog = tasks.create_task(self.service_manager.keep_watchdog(), name="watchdog")
                supervisor = tasks.create_task(self.supervisor.run(), name="supervisor")
                await self._find_adopted_models()
                poller = tasks.create_task(self.state_poller.run(), name="state_poller")
                helpers = [
                    poller,
                    tasks.create_task(self.proxy.run(), name="proxy"),
                    tasks.create_task(self.key_watcher.run(), name="key_watcher"),
                ]
                if admin_listener is not None:
                    helpers.append(tasks.create_task(self.admin.run(admin_listener), name="admin"))
                server = await self._open(listener.socket)
                await stop.asked.wait()
                if stop.leaves_servers and listener.is_inherited:
                    await self._end_connections(server, stop.at_once)
                await self._close(stop)
                for task in (*helpers, watchdog):
                    task.cancel()
                await supervisor
        finally:
            for number in (*_STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _reload(self, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self.reloader.reload_on_signal(), name="reload")

    async def _find_adopted_models(self) -> None:
        """Before the first request, so that it finds what is loaded instead of loading it elsewhere."""
        if not self.adopted:
            return
        states = InstanceState.READY, InstanceState.BACKOFF, InstanceState.FATAL
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADOPTED_READY_SECONDS):
                await asyncio.gather(*(self.supervisor.wait_for(name, *states) for name in self.adopted))
        await self.state_poller.read_residencies()

    async def _end_connections(self, server: asyncio.AbstractServer, at_once: asyncio.Event) -> None:
        """Serves what this router has been sent; what comes now waits for the next router."""
        server.close()
        structlog.get_logger("router").info("handing_over", drain_timeout_seconds=self.drain_timeout_seconds)
        if self.proxy.drain(spares_new=True):
            await _finishes_first(at_once.wait(), at_once, _NEW_CONNECTIONS_SECONDS)
        await _finishes_first(self.api_server.drained(), at_once, self.drain_timeout_seconds)

    async def _open(self, listener: socket.socket) -> asyncio.AbstractServer:
        # Objects from startup live as long as the process. Without them in every collection a request is 5 % cheaper.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        server = await asyncio.get_running_loop().create_server(self.proxy, sock=listener, ssl=self.tls)
        host, port = listener.getsockname()[:2]
        log = structlog.get_logger("router")
        url = endpoint_url("http" if self.tls is None else "https", host, port)
        log.info("listening", url=url, **({"emulated": self.title} if self.title else {}))
        self.service_manager.ready(f"listening on {url}")
        return server

    async def _close(self, stop: _Stop) -> None:
        """Drains, then stops the servers, then closes the remaining connections."""
        log = structlog.get_logger("router")
        self.service_manager.stopping()
        log.info("draining", drain_timeout_seconds=self.drain_timeout_seconds)
        at_once = stop.at_once
        self.controller.begin_shutdown()
        if not stop.leaves_servers:
            self.supervisor.drain_all()
        self.proxy.drain()
        if not await _finishes_first(self.api_server.drained(), at_once, self.drain_timeout_seconds):
            log.warning("requests_cut")
            # Before their servers are stopped: otherwise clients would be told that the instance died.
            self.cutoff.error = _cut_off(None if at_once.is_set() else self.drain_timeout_seconds)
            self.proxy.cut(self.cutoff.error)
        if at_once.is_set():
            self.supervisor.kill_all()
        async with asyncio.TaskGroup() as group:
            leaves = stop.leaves_servers and not at_once.is_set()
            end = group.create_task(self.supervisor.leave_all() if leaves else self.supervisor.stop_all())
            kill = group.create_task(self._kill_when(at_once))
            await end
            kill.cancel()
        await self.library.shutdown(timeout=1.0)
        await self.admin.library.shutdown(timeout=1.0)
        await self.proxy.close()
        await self.admin.proxy.close()
        log.info("stopped")

    async def _kill_when(self, at_once: asyncio.Event) -> None:
        await at_once.wait()
        self.supervisor.kill_all()


def endpoint_url(scheme: str, host: str, port: int) -> str:
    """The URL for clients; an IPv6 address gets brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _cut_off(drain_timeout_seconds: float | None) -> ShuttingDown:
    """`drain_timeout_seconds`: None where a second signal came before that."""
    cause = "a second signal stopped it at once"
    if drain_timeout_seconds is not None:
        cause = f"this request had not ended within server.drain_timeout_seconds ({drain_timeout_seconds:g} s)"
    words = f"the router is shutting down, and {cause}; the answer is incomplete"
    return ShuttingDown(words, retry_after_seconds=SHUTDOWN_RETRY_AFTER_SECONDS)


async def _finishes_first(work: Awaitable[object], event: asyncio.Event, seconds: float) -> bool:
    """Whether the work ends before the event is set and before the timeout."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_awaited(work))
        signalled = group.create_task(_awaited(event.wait()))
        await asyncio.wait({task, signalled}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
        task.cancel()
        signalled.cancel()
    return finished


async def _awaited(work: Awaitable[object]) -> None:
    await work
