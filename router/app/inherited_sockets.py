"""Listening sockets that a service manager opened and passes on: sd_listen_fds(3).

They stay open while the router restarts, so that no connection is refused meanwhile.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

from router.app.startup_checks import Address, resolve
from router.config.endpoint import TcpAddress, UnixAddress
from router.config.settings import ConfigError

_FIRST = 3
_MAX = 64


class InheritedSockets:
    """Each socket can be taken once, by its address."""

    def __init__(self, sockets: Iterable[socket.socket]) -> None:
        self._sockets = list(sockets)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], pid: int) -> InheritedSockets:
        """`environment`: of this process; `pid`: its id, for which the sockets must be meant."""
        count = environment.get("LISTEN_FDS", "")
        is_meant = environment.get("LISTEN_PID") == str(pid) and count.isdecimal()
        return cls(_opened(_FIRST + offset) for offset in (range(min(int(count), _MAX)) if is_meant else ()))

    def take(self, address: TcpAddress | UnixAddress) -> socket.socket | None:
        """Returns the socket with this address; None if there is none."""
        for each in self._sockets:
            if _is_at(each, address):
                self._sockets.remove(each)
                return each
        return None

    def refuse_rest(self) -> None:
        """
        Raises:
            ConfigError: a socket was passed that the configuration does not name.
        """
        rest = ", ".join(_text(each) for each in self._sockets)
        for each in self._sockets:
            each.close()
        if rest:
            raise ConfigError(
                [f"server.host, server.port, admin.listen: none of them is {rest}, where the service manager listens "
                 "for the router: give ListenStream= in llamayard.socket and the configuration the same address"]
            )  # fmt: skip


def _opened(descriptor: int) -> socket.socket:
    found = socket.socket(fileno=descriptor)
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def _is_at(listener: socket.socket, address: TcpAddress | UnixAddress) -> bool:
    if isinstance(address, UnixAddress):
        return listener.family is socket.AF_UNIX and listener.getsockname() == str(address.path)
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host, port = listener.getsockname()[:2]
    return port == address.port and ipaddress.ip_address(host) in _resolved(address.host)


def _resolved(host: str) -> tuple[Address, ...]:
    try:
        return resolve(host)
    except OSError:
        return ()


def _text(listener: socket.socket) -> str:
    name: object = listener.getsockname()
    if isinstance(name, tuple):
        host, port = listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"unix:{name}"
