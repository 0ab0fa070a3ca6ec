"""Tells which server a process on a GPU belongs to: by the TCP ports that it and its ancestors listen on.

A server's runners are its children, so that a server's port is among those of its runners. Another user's processes and
those of other containers cannot be looked into: nothing is known of them.
"""

from __future__ import annotations

from dataclasses import replace

import psutil

from router.domain.gpu import Gpu, GpuProcess
from router.gpu.poller import GpuReader


class OwnedProcessReader:
    """A `GpuReader` that adds the ports to the processes of another. Each process is looked at once in its life."""

    def __init__(self, reader: GpuReader) -> None:
        self._reader = reader
        self._ports: dict[tuple[int, float], tuple[int, ...]] = {}
        """By pid and time of creation."""

    def read(self) -> tuple[Gpu, ...]:
        gpus, seen = self._reader.read(), dict[tuple[int, float], tuple[int, ...]]()
        owned = tuple(
            replace(gpu, processes=tuple(self._owned(process, seen) for process in gpu.processes)) for gpu in gpus
        )
        self._ports = seen
        return owned

    def close(self) -> None:
        self._reader.close()

    def _owned(self, process: GpuProcess, seen: dict[tuple[int, float], tuple[int, ...]]) -> GpuProcess:
        try:
            found = psutil.Process(process.pid)
            key = process.pid, found.create_time()
        except psutil.Error:
            return process
        ports = seen.get(key) or self._ports.get(key) or listening_ports(found)
        seen[key] = ports
        return replace(process, server_ports=ports)


def listening_ports(process: psutil.Process) -> tuple[int, ...]:
    """The ports that the process and its ancestors listen on, as far as they can be looked into."""
    ports = set[int]()
    try:
        family = [process, *process.parents()]
    except psutil.Error:
        return ()
    for each in family:
        ports |= set(own_ports(each))
    return tuple(sorted(ports))


def own_ports(process: psutil.Process) -> tuple[int, ...]:
    """The ports that the process itself listens on; empty if it cannot be looked into."""
    try:
        connections = process.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ()
    return tuple(sorted({each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}))
