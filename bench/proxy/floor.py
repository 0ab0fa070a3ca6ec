"""The floor of any relay in Python: bytes go through uvloop from one socket to another, and nothing is read of them.

A connection of its own to the server for each of a client's; no HTTP, no deciding, no log. What it costs is the system
calls, the event loop, and four calls of Python a request. `python -m bench.proxy.floor PORT SERVER_PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class _End(asyncio.Protocol):
    """One of the two ends; what comes on it goes out on the other."""

    def __init__(self, server_port: int | None) -> None:
        self._server_port = server_port
        self.other: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._server_port is not None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(self._server_port))

    async def _connect(self, port: int) -> None:
        _, behind = await asyncio.get_running_loop().create_connection(lambda: _End(None), "127.0.0.1", port)
        behind.other = self.transport
        self.other = behind.transport
        for data in self._early:
            self.other.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)
        else:
            self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


async def _serve(port: int, server_port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _End(server_port), "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
