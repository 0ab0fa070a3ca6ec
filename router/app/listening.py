"""The sockets that the router listens on: the endpoint's, and one of their own for metrics and status."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from router.app.inherited_sockets import InheritedSockets
from router.config.endpoint import DEFAULT_PORT, TcpAddress, listen_address
from router.config.settings import ConfigError, Settings

_BACKLOG = 4096
_SOCKET_MODE = 0o660


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket."""

    socket: socket.socket
    is_inherited: bool
    """Whether the service manager holds it too, so that connections wait in it while the router restarts."""


def listen(settings: Settings, inherited: InheritedSockets) -> Listener:
    """The endpoint's listener. It is bound before anything is started, so that a port in use fails at once.

    Raises:
        ConfigError: it cannot listen there.
    """
    address = TcpAddress(settings.server.host, settings.server.port)
    found = inherited.take(address)
    if found is not None:
        return Listener(found, is_inherited=True)
    return Listener(_bound(address), is_inherited=False)


def _bound(address: TcpAddress) -> socket.socket:
    try:
        return _listen_tcp(address)
    except OSError as error:
        raise ConfigError([_listen_problem(address, error)]) from error


def listen_for_admin(settings: Settings, inherited: InheritedSockets) -> socket.socket | None:
    """The listener of `admin.listen`; None without one.

    Raises:
        ConfigError: it cannot listen there.
    """
    address = listen_address(settings.admin.listen)
    if address is None:
        return None
    found = inherited.take(address)
    if found is not None:
        return found
    try:
        return _listen_tcp(address) if isinstance(address, TcpAddress) else _listen_unix(address.path)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([f"admin.listen: cannot listen on {settings.admin.listen}: {reason}"]) from error


def _listen_tcp(address: TcpAddress) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    with _closed_on_error(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    return listener


def _listen_unix(path: Path) -> socket.socket:
    """For the user and the group of the process. Replaces a socket that nothing listens on."""
    listener = socket.socket(socket.AF_UNIX)
    with _closed_on_error(listener):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not _is_served(path):
                path.unlink()
        mask = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _closed_on_error(listener: socket.socket) -> Generator[None]:
    try:
        yield
    except BaseException:
        listener.close()
        raise


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _listen_problem(address: TcpAddress, error: OSError) -> str:
    host, port = address.host, address.port
    if error.errno != errno.EADDRINUSE:
        return f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror or error}"
    if port == DEFAULT_PORT:
        return (
            f"server.port: port {port} on {host} is in use, perhaps by the stock Ollama service: free it with "
            f"`sudo systemctl disable --now ollama`, or use another port: `--port {port + 1}`"
        )
    return f"server.port: port {port} on {host} is in use by another program: choose another one with `--port`"
