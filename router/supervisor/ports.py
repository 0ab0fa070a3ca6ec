"""Finds free loopback ports for instances. Does not reserve them: the server binds its port later."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection

_FIRST, _LAST = 20_000, 32_767
"""Below Linux's ephemeral range (32768 to 60999): any program's outgoing connection could take a port from that range
while its server restarts."""
_STRIDE = 64


class NoFreePort(OSError):
    """Too few ports are free; the message says how many, and in which range."""


def free_ports(count: int, seed: int | None = None, avoid: Collection[int] = ()) -> tuple[int, ...]:
    """Returns `count` different ports on 127.0.0.1 that nothing is bound to.

    The search starts at an offset derived from `seed`, by default the process id, so that routers started at the same
    time find different ports. `avoid` has ports already assigned to servers that may not be listening yet.

    Raises:
        NoFreePort: there are fewer free ports than `count`.
    """
    size = _LAST - _FIRST + 1
    start = (os.getpid() if seed is None else seed) * _STRIDE % size
    ports: list[int] = []
    with contextlib.ExitStack() as bound_sockets:
        for offset in range(size):
            if len(ports) == count:
                break
            port = _FIRST + (start + offset) % size
            if port not in avoid and (bound_socket := _try_bind(port)) is not None:
                bound_sockets.enter_context(bound_socket)
                ports.append(port)
    if len(ports) < count:
        raise NoFreePort(f"only {len(ports)} of {count} ports are free between {_FIRST} and {_LAST} on 127.0.0.1")
    return tuple(ports)


def _try_bind(port: int) -> socket.socket | None:
    """Returns a socket bound to the port, or None if the port is taken."""
    candidate = socket.socket()
    try:
        candidate.bind(("127.0.0.1", port))
    except OSError:
        candidate.close()
        return None
    return candidate
