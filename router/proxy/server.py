"""The proxy as a whole: makes the protocol of each accepted connection, checks their deadlines, and drains.

Deadlines of all connections are checked together, once per period, so that none costs a timer. They are accurate to one
period.
"""

from __future__ import annotations

import asyncio
from typing import cast

from router.errors import RouterError
from router.observability.running_request import RunningRequest
from router.proxy.client_connection import ClientConnection
from router.proxy.context import ProxyContext
from router.proxy.memory_trim import trimmer

TRIM_SECONDS = 5.0
"""Minimum interval between returns of free memory, after long bodies or many closed connections."""
_MANY_CONNECTIONS = 500


class ProxyServer:
    """A protocol factory: calling it makes the protocol of a new connection. `run` must run concurrently."""

    def __init__(self, context: ProxyContext) -> None:
        self.context = context
        self._connections: set[ClientConnection] = set()
        limits = context.limits
        shortest = min(
            context.rules.heartbeat_seconds or float("inf"),
            limits.first_byte_timeout_seconds,
            limits.idle_timeout_seconds,
            limits.head_timeout_seconds,
            limits.body_timeout_seconds,
            limits.connection_timeout_seconds,
            limits.linger_timeout_seconds,
            limits.upload_slot_timeout_seconds,
        )
        self._period_seconds = min(1.0, shortest / 4)
        self.closing = False
        self.long_bodies = 0
        self._lost_connections = 0
        self._trim = trimmer()
        self._trimmed: tuple[int, float] = (-1, 0.0)
        """The amount of memory-consuming work, and the time, at the last return of free memory."""

    def __call__(self) -> ClientConnection:
        return ClientConnection(self.context, self)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    @property
    def is_full(self) -> bool:
        return len(self._connections) > self.context.limits.max_connections

    def opened(self, connection: asyncio.Protocol) -> None:
        self._connections.add(cast("ClientConnection", connection))

    def lost(self, connection: asyncio.Protocol) -> None:
        self._connections.discard(cast("ClientConnection", connection))
        self._lost_connections += 1

    async def run(self) -> None:
        """Checks deadlines until it is cancelled."""
        time = asyncio.get_running_loop().time
        while True:
            due = time() + self._period_seconds
            await asyncio.sleep(self._period_seconds)
            self.context.record_lag(time() - due)
            now = self.context.controller.now()
            for connection in tuple(self._connections):
                connection.check(now)
            self._lost_connections += self.context.pool.sweep(now)
            work = self.long_bodies + self._lost_connections // _MANY_CONNECTIONS
            if work != self._trimmed[0] and now - self._trimmed[1] > TRIM_SECONDS:
                self._trimmed = work, now
                await asyncio.to_thread(self._trim)

    def running_requests(self) -> list[RunningRequest]:
        """Requests that are with a server now, of all connections."""
        return [request for each in self._connections if (request := each.running()) is not None]

    def forget_heads(self) -> None:
        """What was derived from request heads holds no more: the access keys have changed."""
        self.context.heads.clear()
        for connection in self._connections:
            connection.forget_head()

    def drain(self, *, spares_new: bool = False) -> bool:
        """Closes idle connections now, and others after their next response.

        With `spares_new`, connections that have sent nothing yet stay open for one request; returns whether any do.
        """
        self.closing = True
        spared = [connection for connection in self._connections if spares_new and connection.is_new]
        for connection in self._connections.difference(spared):
            connection.drain()
        return bool(spared)

    def cut(self, error: RouterError) -> None:
        """Ends the requests that still hold or await a slot, with an error that their clients see."""
        for connection in tuple(self._connections):
            connection.cut(error)

    async def close(self) -> None:
        """Cuts remaining connections."""
        self.closing = True
        for connection in tuple(self._connections):
            connection.abort()
        await self.context.tasks.close()
        await self.context.pool.close()
