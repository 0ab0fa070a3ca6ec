"""The relay as a whole: makes the protocol of each accepted connection, looks at all their deadlines, and drains.

Deadlines are looked at every `period_seconds` for all connections together, so that none costs a timer; each is kept to
within that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from router.admission.origin_check import OriginPolicy
from router.api.context import GatewayContext
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot
from router.llm_api.routes import RouteTable
from router.observability.access_log import AccessLog
from router.proxy.client_connection import ClientConnection
from router.proxy.context import Desk, Patience, Tasks
from router.proxy.memory_trim import trimmer
from router.proxy.upstream_pool import Pool

TRIM_SECONDS = 5.0
"""So often memory is given back while long bodies come, or many connections go."""
_MANY_CONNECTIONS = 500


class Relay:
    """Call it for the protocol of a new connection, as a server's protocol factory. `run` must run beside it."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._connections: set[ClientConnection] = set()
        limits, patience = desk.limits, desk.patience
        shortest = min(
            desk.rules.heartbeat_seconds or float("inf"),
            limits.first_byte_timeout_seconds,
            limits.idle_timeout_seconds,
            patience.head_seconds,
            patience.body_seconds,
            patience.idle_seconds,
            patience.linger_seconds,
            patience.slot_seconds,
        )
        self._period_seconds = min(1.0, shortest / 4)
        self.closing = False
        self.long_bodies = 0
        self._gone = 0
        self._trim = trimmer()
        self._trimmed: tuple[int, float] = (-1, 0.0)
        """After how much that took memory, and when, it was last given back."""

    def __call__(self) -> ClientConnection:
        return ClientConnection(self.desk, self)

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
            now = self.desk.engine.now()
            for connection in tuple(self._connections):
                connection.check(now)
            self._gone += self.desk.pool.sweep(now)
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
        await self.desk.tasks.close()
        await self.desk.pool.close()


def relay_over(
    context: GatewayContext,
    origins: OriginPolicy,
    access: AccessLog,
    make_handler: Callable[[], asyncio.Protocol],
    patience: Patience,
    *,
    debug_headers: bool,
) -> Relay:
    """The relay of a router: what is not its business goes to `make_handler`'s protocols."""
    engine = context.engine
    return Relay(
        Desk(
            engine=engine,
            catalog=context.catalog,
            pool=Pool(context.limits.connect_timeout_seconds, engine.now),
            books=access,
            origins=origins,
            limits=context.limits,
            rules=context.rules,
            abilities=context.abilities,
            primary=context.primary,
            cards=lambda: engine.snapshot().gpus,
            has_free_slot=lambda facts: _has_free_slot(engine.snapshot(), facts),
            debug_headers=debug_headers,
            make_handler=make_handler,
            patience=patience,
            table=RouteTable(),
            tasks=Tasks(),
        )
    )


def _has_free_slot(snapshot: Snapshot, facts: ModelFacts) -> bool:
    return any(
        copy.blob == facts.blob
        and not copy.options
        and copy.state is ResidencyState.READY
        and copy.in_flight < copy.slots
        for copy in snapshot.residencies.values()
    )
