"""The relay as a whole: makes the protocol of each accepted connection, looks at all their deadlines, and drains.

Deadlines are looked at every `period_seconds` for all connections together, so that none costs a timer; each is kept to
within that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from router.admission.origin_check import OriginPolicy
from router.api.context import ApiContext
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot
from router.llm_api.routes import RouteTable
from router.observability.access_log import AccessLog
from router.proxy.client_connection import ClientConnection
from router.proxy.context import ClientTimeouts, ProxyContext, Tasks
from router.proxy.memory_trim import trimmer
from router.proxy.upstream_pool import Pool

TRIM_SECONDS = 5.0
"""So often memory is given back while long bodies come, or many connections go."""
_MANY_CONNECTIONS = 500


class ProxyServer:
    """Call it for the protocol of a new connection, as a server's protocol factory. `run` must run beside it."""

    def __init__(self, context: ProxyContext) -> None:
        self.context = context
        self._connections: set[ClientConnection] = set()
        limits, timeouts = context.limits, context.timeouts
        shortest = min(
            context.rules.heartbeat_seconds or float("inf"),
            limits.first_byte_timeout_seconds,
            limits.idle_timeout_seconds,
            timeouts.head_seconds,
            timeouts.body_seconds,
            timeouts.idle_seconds,
            timeouts.linger_seconds,
            timeouts.slot_seconds,
        )
        self._period_seconds = min(1.0, shortest / 4)
        self.closing = False
        self.long_bodies = 0
        self._gone = 0
        self._trim = trimmer()
        self._trimmed: tuple[int, float] = (-1, 0.0)
        """After how much that took memory, and when, it was last given back."""

    def __call__(self) -> ClientConnection:
        return ClientConnection(self.context, self)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def opened(self, connection: asyncio.Protocol) -> None:
        self._connections.add(cast("ClientConnection", connection))

    def lost(self, connection: asyncio.Protocol) -> None:
        self._connections.discard(cast("ClientConnection", connection))
        self._gone += 1

    async def run(self) -> None:
        """Looks at deadlines until it is cancelled."""
        while True:
            await asyncio.sleep(self._period_seconds)
            now = self.context.controller.now()
            for connection in tuple(self._connections):
                connection.check(now)
            self._gone += self.context.pool.sweep(now)
            spent = self.long_bodies + self._gone // _MANY_CONNECTIONS
            if spent != self._trimmed[0] and now - self._trimmed[1] > TRIM_SECONDS:
                self._trimmed = spent, now
                await asyncio.to_thread(self._trim)

    def drain(self) -> None:
        """From now on connections end with an answer: those that give none at once, new ones with their first."""
        self.closing = True
        for connection in tuple(self._connections):
            connection.drain()

    async def close(self) -> None:
        """Cuts what is left."""
        self.closing = True
        for connection in tuple(self._connections):
            connection.abort()
        await self.context.tasks.close()
        await self.context.pool.close()


def proxy_factory(
    context: ApiContext,
    origins: OriginPolicy,
    access: AccessLog,
    make_handler: Callable[[], asyncio.Protocol],
    timeouts: ClientTimeouts,
    *,
    debug_headers: bool,
) -> ProxyServer:
    """The relay of a router: what is not its business goes to `make_handler`'s protocols."""
    controller = context.controller
    return ProxyServer(
        ProxyContext(
            controller=controller,
            catalog=context.catalog,
            pool=Pool(context.limits.connect_timeout_seconds, controller.now),
            request_log=access,
            origins=origins,
            limits=context.limits,
            rules=context.rules,
            endpoint_support=context.endpoint_support,
            primary=context.primary,
            gpus=lambda: controller.snapshot().gpus,
            has_free_slot=lambda facts: _has_free_slot(controller.snapshot(), facts),
            debug_headers=debug_headers,
            make_handler=make_handler,
            timeouts=timeouts,
            table=RouteTable(),
            tasks=Tasks(),
        )
    )


def _has_free_slot(snapshot: Snapshot, facts: ModelFacts) -> bool:
    return any(
        replica.blob == facts.blob
        and not replica.options
        and replica.state is ResidencyState.READY
        and replica.in_flight < replica.slots
        for replica in snapshot.residencies.values()
    )
