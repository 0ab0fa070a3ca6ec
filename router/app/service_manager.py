"""Talks to the service manager that started the router: readiness, the watchdog, and how far a stop has come.

The protocol is that of sd_notify(3): datagrams to the socket that `NOTIFY_SOCKET` names. Without one, nothing is sent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

import structlog

_USEC_PER_SECOND = 1_000_000


class ServiceManager:
    """`is_present` if a service manager listens."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        """`environment`: of this process; `pid`: its id, for which the watchdog must be meant."""
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watchdog_seconds = _watchdog_seconds(environment, pid)
        self._log = structlog.get_logger("router")

    @property
    def is_present(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The router serves; `status` is one line for `systemctl status`."""
        self._notify(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        self._notify(f"STATUS={text}")

    def stopping(self) -> None:
        self._notify("STOPPING=1\nSTATUS=draining")

    async def keep_watchdog(self) -> None:
        """Reports twice per period that the event loop runs; returns at once if no watchdog is set."""
        if not self.is_present or self._watchdog_seconds is None:
            return
        while True:
            self._notify("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds / 2)

    def _notify(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            self._log.warning("service_manager_unreachable", error=str(error))


def _watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """The period within which the service manager wants to hear from the router."""
    text, meant_for = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    if not text.isdecimal() or int(text) == 0 or meant_for != str(pid):
        return None
    return int(text) / _USEC_PER_SECOND
