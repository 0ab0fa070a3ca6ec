"""What `serve` needs from the machine before anything is started: TLS files, an address, a directory for its state.

Used by `serve` and by `check-config`. Reads files and resolves names, blocking; creates nothing and opens no port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from router.app.access_keys import has_keys, read_keys
from router.config.endpoint import TcpAddress, listen_address
from router.config.settings import ConfigError, Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str], tuple[Address, ...]]
"""Addresses of a host name. Raises OSError if it has none."""


def resolve(host: str) -> tuple[Address, ...]:
    """Raises OSError: the name cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # a label that is empty or too long
        raise OSError("not a host name") from error
    return tuple(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


def is_writable(directory: Path) -> bool:
    """Whether this process may create files in an existing directory."""
    return os.access(directory, os.W_OK | os.X_OK)


def startup_problems(settings: Settings, resolver: Resolver = resolve) -> list[str]:
    """Sentences about what the machine does not have or allow."""
    problems = [
        *host_problems(settings, resolver),
        *exposure_problems(settings, resolver),
        *state_directory_problems(settings.state_directory),
        *adoption_problems(settings, sys.platform),
    ]
    try:
        tls_context(settings)
    except ConfigError as error:
        problems.extend(error.problems)
    return [*problems, *loop_problems(settings, resolver)]


def adoption_problems(settings: Settings, platform: str) -> list[str]:
    """`platform`: as in `sys.platform`."""
    if settings.ollama.adopt and platform != "linux":
        return ["ollama.adopt: servers can outlive their router on Linux only: leave it out"]
    return []


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS context of the endpoint; None without TLS.

    Raises:
        ConfigError: a file is missing or cannot be used, or the key is not the certificate's.
    """
    certificate, key = settings.server.tls_certificate, settings.server.tls_key
    if certificate is None or key is None:
        return None
    files = (("server.tls_certificate", certificate), ("server.tls_key", key))
    unreadable = [problem for name, path in files if (problem := _read_problem(name, path))]
    if unreadable:
        raise ConfigError(unreadable)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # without a password, OpenSSL would ask the terminal
    except OSError as error:  # ssl.SSLError is one too
        raise ConfigError([_tls_problem(certificate, key, error)]) from error
    return context


def _read_problem(name: str, path: Path) -> str | None:
    try:
        path.read_bytes()
    except OSError as error:
        return f"{name}: {path}: cannot be read: {error.strerror}"
    return None


def _tls_problem(certificate: Path, key: Path, error: OSError) -> str:
    reason = getattr(error, "reason", None) or str(error)
    if reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):  # the latter if the types of key differ
        return f"server.tls_key: {key} is not the key of the certificate in server.tls_certificate, {certificate}"
    return (
        f"server.tls_certificate, server.tls_key: {certificate}, {key}: cannot be used ({reason}): "
        "they must be PEM files, the key without a password"
    )


def host_problems(settings: Settings, resolver: Resolver = resolve) -> list[str]:
    """Whether the name or address to listen on exists."""
    host = settings.server.host
    try:
        resolver(host)
    except OSError as error:
        return [f"server.host: {host!r} cannot be resolved: {error.strerror or error}"]
    return []


def exposure_problems(settings: Settings, resolver: Resolver = resolve) -> list[str]:
    """Listeners that other machines reach although nothing asks them for a key."""
    try:
        if settings.server.allow_anonymous or has_keys(settings):
            read_keys(settings)
            return []
    except ConfigError as error:
        return error.problems
    admin = listen_address(settings.admin.listen)
    listeners = [("server.host", settings.server.host)]
    listeners += [("admin.listen", admin.host)] if isinstance(admin, TcpAddress) else []
    return [
        f"{name}: {host} can be reached from other machines, and there are no access keys: create one with "
        "`llamayard keys create NAME`, or let everybody in with `server.allow_anonymous: true`"
        for name, host in listeners
        if not _is_local(host, resolver)
    ]


def _is_local(host: str, resolver: Resolver) -> bool:
    try:
        return all(address.is_loopback for address in resolver(host))
    except OSError:
        return True  # it cannot be listened on either


def state_directory_problems(path: Path, writable: Callable[[Path], bool] = is_writable) -> list[str]:
    """Whether the directory exists and can be written, or could be created."""
    existing = next((each for each in (path, *path.parents) if _exists(each)), path)
    if not existing.is_dir():
        return [f"state_directory: {path}: {existing} is a file, not a directory"]
    if not writable(existing):
        verb = "written" if existing == path else f"created: {existing} cannot be written"
        return [f"state_directory: {path} cannot be {verb} by the user with id {os.geteuid()}"]
    return []


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a parent is a file, or may not be entered
        return path.exists()
    return False


def loop_problems(settings: Settings, resolver: Resolver = resolve) -> Iterator[str]:
    """Attached servers that are the router itself: each request would be forwarded to itself without end."""
    for instance in settings.instances:
        url = urlsplit(instance.url or "")
        if url.hostname is None or (url.port or (443 if url.scheme == "https" else 80)) != settings.server.port:
            continue
        try:
            is_router = _is_own_address(settings.server.host, resolver(url.hostname), resolver)
        except OSError:
            continue
        if is_router:
            yield (
                f"instances: {instance.url} is the router's own address ({settings.server.host}:"
                f"{settings.server.port}): name the port of an Ollama server"
            )


def _is_own_address(host: str, addresses: tuple[Address, ...], resolver: Resolver) -> bool:
    listening = resolver(host)
    if any(each.is_unspecified for each in addresses):  # connecting to 0.0.0.0 reaches this machine
        addresses = (*addresses, ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))
    if any(each.is_unspecified for each in listening):
        return any(each.is_loopback or _is_of_this_machine(each) for each in addresses)
    return bool(set(listening) & set(addresses))


def _is_of_this_machine(address: Address) -> bool:
    """Only an address of this machine can be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
