"""`serve`: binds the port, looks at the machine, builds the router and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl

import structlog

from router.app.hardware import detect_hardware
from router.app.wiring import build
from router.config.settings import ConfigError, Settings
from router.observability.logging import configure_logs
from router.supervisor import orphan_reaper

_LISTEN_BACKLOG = 4096


async def serve(settings: Settings) -> None:
    """Runs the router until a signal stops it.

    Raises:
        ConfigError: a value cannot be used on this machine: a port in use, a bad certificate, a GPU that is not there.
    """
    configure_logs(settings.log.format, settings.log.level)
    log = structlog.get_logger("router")
    tls = _tls(settings)
    try:
        listener = _listen(settings)
    except OSError as error:
        raise ConfigError([_listen_problem(settings, error)]) from error
    with contextlib.closing(listener):
        hardware = await asyncio.to_thread(detect_hardware, settings)
        for orphan in await asyncio.to_thread(orphan_reaper.reap_orphans, str(settings.state_directory)):
            log.warning("swept", pid=orphan.pid, instance=orphan.instance, command=orphan.command)
        async with build(settings, hardware, tls) as router:
            await router.run(listener)


def _listen(settings: Settings) -> socket.socket:
    """A listening socket. It is bound before anything is started, so that a port in use fails at once."""
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_LISTEN_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_problem(settings: Settings, error: OSError) -> str:
    host, port = settings.server.host, settings.server.port
    if error.errno != errno.EADDRINUSE:
        return f"server.host, server.port: cannot listen on {host}:{port}: {error.strerror or error}"
    return (
        f"server.port: port {port} on {host} is in use, perhaps by the stock Ollama service: free it with "
        f"`sudo systemctl disable --now ollama`, or use another port: `--port {port + 1}`"
    )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """TLS context of the endpoint; None without TLS.

    Raises:
        ConfigError: a file cannot be used.
    """
    certificate, key = settings.server.tls_certificate, settings.server.tls_key
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one too
        raise ConfigError([f"server.tls_certificate, server.tls_key: {certificate}, {key}: {error}"]) from error
    return context
