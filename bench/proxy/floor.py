"""The floor: the minimum cost of any Python proxy. Copies bytes between sockets with uvloop and parses nothing.

One server connection per client connection; no HTTP, scheduling or logging. Its cost is the system calls, the event
loop and four Python calls per request. Usage: `python -m bench.proxy.floor PORT SERVER_PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class _Side(asyncio.Protocol):
    """One side of a connection pair; copies received bytes to the other side."""

    def __init__(self, server_port: int | None) -> None:
        self._server_port = server_port
        self.other: asyncio.Transport | None = None
        self._buffered: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._server_port is not None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(self._server_port))

    async def _connect(self, port: int) -> None:
        _, server_side = await asyncio.get_running_loop().create_connection(lambda: _Side(None), "127.0.0.1", port)
        server_side.other = self.transport
        self.other = server_side.transport
        for data in self._buffered:
            self.other.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)
        else:
            self._buffered.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


async def _serve(port: int, server_port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Side(server_port), "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
