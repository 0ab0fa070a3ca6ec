"""Finds loopback ports for instances. Reserves nothing: a port is free when found, and the server takes it later."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection

_FIRST, _LAST = 20_000, 32_767
"""Below Linux's ephemeral range (32768 to 60999), from which any program's outgoing connection may take a port while a
server that is being restarted does not hold it."""
_STRIDE = 64


class NoFreePort(OSError):
    """Too few ports are free; the text says how many and where they were sought."""


def free_ports(count: int, seed: int | None = None, avoid: Collection[int] = ()) -> tuple[int, ...]:
    """So many different ports on 127.0.0.1 that nothing listens on. Raises NoFreePort.

    The search begins at a place that depends on `seed`, by default this process's number, so that routers started at
    the same moment do not find the same ports. `avoid`: ports that were given to servers that may not listen yet.
    """
    size = _LAST - _FIRST + 1
    start = (os.getpid() if seed is None else seed) * _STRIDE % size
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for offset in range(size):
            if len(found) == count:
                break
            port = _FIRST + (start + offset) % size
            if port not in avoid and (probe := _bound(port)) is not None:
                held.enter_context(probe)
                found.append(port)
    if len(found) < count:
        raise NoFreePort(f"only {len(found)} of {count} ports are free between {_FIRST} and {_LAST} on 127.0.0.1")
    return tuple(found)


def _bound(port: int) -> socket.socket | None:
    probe = socket.socket()
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        probe.close()
        return None
    return probe
