"""Who may call from a browser: the checks of Host and Origin that an Ollama server makes itself.

A proxy sets Host, so the server behind it can no longer tell a page that reached it by DNS rebinding from a local
program: whoever sets Host must check it. The answers are those of Ollama, to the header (`cors-*`, `host-*` and
`options-no-origin` in the recordings). It authenticates nobody: what sends no Origin is let through.

Sources: allowedHostsMiddleware in server/routes.go and AllowedOrigins in envconfig/config.go (v0.11.4 to v0.24);
gin-contrib/cors v1.7.2, whose order (Origin first, then Host) and pattern matching are kept.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import psutil

Pairs = tuple[tuple[str, str], ...]

ALLOW_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    "X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
    "X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
ALLOW_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
MAX_AGE_SECONDS = 43200

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_PRIVATE_NETWORKS = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
_UNSPECIFIED = frozenset(map(ipaddress.ip_address, ("0.0.0.0", "::")))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer that ends the request here."""

    status: int
    headers: Pairs
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`answer` ends the request where it is set; else `headers` go on whatever answer the request gets."""

    answer: Answer | None = None
    headers: Pairs = ()


class Origins:
    """The origins that may call, from patterns with at most one `*`.

    Raises:
        ValueError: a pattern with more than one `*`.
    """

    __slots__ = ("_all", "_exact", "_wildcards")

    def __init__(self, patterns: Iterable[str]) -> None:
        given = [pattern.strip() for pattern in patterns]
        bad = [pattern for pattern in given if pattern.count("*") > 1]
        if bad:
            raise ValueError(f"server.cors_origins: only one * is allowed in {bad[0]!r}")
        self._all = "*" in given
        self._exact = frozenset(pattern.lower() for pattern in given)
        self._wildcards = tuple((head, tail) for head, star, tail in (p.partition("*") for p in given) if star)

    @property
    def allow_all(self) -> bool:
        return self._all

    def allow(self, origin: str) -> bool:
        """As gin-contrib/cors has it: plain ones in lower case, patterns by their head and tail as written."""
        if self._all or origin in self._exact:
            return True
        return any(origin.startswith(head) and origin.endswith(tail) for head, tail in self._wildcards)


class OriginPolicy:
    """Judges one request's Host and Origin."""

    __slots__ = ("_bound_to_loopback", "_origins", "_own_names")

    def __init__(self, origins: Origins, bound_to_loopback: bool, own_names: Collection[str]) -> None:
        self._origins = origins
        self._bound_to_loopback = bound_to_loopback
        self._own_names = frozenset(name.lower() for name in own_names)

    def judge(self, method: str, host: str | None, origin: str | None, allow: Sequence[str] = ()) -> Verdict:
        """`allow` are the methods of the request's route, empty where there is no such path."""
        host = host or ""
        # Routing comes first in Ollama: what it says of the methods stays on the answer.
        routed: Pairs = (("Allow", ", ".join(allow)),) if allow and method not in allow else ()
        cross = origin if origin and origin not in (f"http://{host}", f"https://{host}") else None
        headers: Pairs = ()
        if cross is not None:
            if not self._origins.allow(cross):
                return Verdict(Answer(403, routed))
            if method == "OPTIONS":
                return Verdict(Answer(204, (*self._preflight(cross), *routed)))
            headers = self._allowed(cross)
        if not host_allowed(host, self._bound_to_loopback, self._own_names):
            return Verdict(Answer(403, (*headers, *routed)))
        return self._options(host, routed) if method == "OPTIONS" else Verdict(None, headers)

    def _allowed(self, origin: str) -> Pairs:
        if self._origins.allow_all:
            return (("Access-Control-Allow-Origin", "*"),)
        return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))

    def _preflight(self, origin: str) -> Pairs:
        every = self._origins.allow_all
        vary = () if every else ("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        return (
            ("Access-Control-Allow-Headers", ALLOW_HEADERS),
            ("Access-Control-Allow-Methods", ALLOW_METHODS),
            ("Access-Control-Allow-Origin", "*" if every else origin),
            ("Access-Control-Max-Age", str(MAX_AGE_SECONDS)),
            *(("Vary", name) for name in vary),
        )

    def _options(self, host: str, routed: Pairs) -> Verdict:
        """OPTIONS that is no preflight: a listener on loopback answers 204 to names, and 405 (or 404) to addresses."""
        name = _without_port(host)
        if self._bound_to_loopback and not _is_local_address(name, self._own_names):
            return Verdict(Answer(204, routed))
        return Verdict(method_not_allowed(routed[0][1].split(", ")) if routed else not_found())


def host_allowed(host_header: str, bound_to_loopback: bool, own_names: Collection[str]) -> bool:
    """Whether a Host header is this machine's; on a listener that is open to the network any is, as in Ollama.

    `own_names` are the machine's own names and addresses, in lower case.
    """
    if not bound_to_loopback:
        return True
    host = _without_port(host_header)
    return _is_local_address(host, own_names) or _is_local_name(host.lower(), own_names)


def machine_names() -> frozenset[str]:
    """This machine's host name and the addresses of its interfaces, in lower case, as they are now."""
    addresses = (address.address for found in psutil.net_if_addrs().values() for address in found)
    return frozenset((socket.gethostname().lower(), *(address.partition("%")[0].lower() for address in addresses)))


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine only."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def not_found() -> Answer:
    """Ollama's answer to a path that it does not know."""
    return Answer(404, (("Content-Type", "text/plain"),), b"404 page not found")


def method_not_allowed(allow: Sequence[str]) -> Answer:
    """Ollama's answer to a method that a known path does not take."""
    return Answer(405, (("Allow", ", ".join(allow)), ("Content-Type", "text/plain")), b"405 method not allowed")


def _is_local_name(name: str, own_names: Collection[str]) -> bool:
    return name in ("", "localhost") or name in own_names or name.endswith(_LOCAL_SUFFIXES)


def _is_local_address(host: str, own_names: Collection[str]) -> bool:
    address = _address(host)
    if address is None:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    plain = mapped or address
    if plain.is_loopback or address in _UNSPECIFIED or str(address) in own_names:
        return True
    return any(plain in network for network in _PRIVATE_NETWORKS)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _without_port(host: str) -> str:
    """The host of Go's net.SplitHostPort, or all of it where that finds fault."""
    if host.startswith("["):
        inside, bracket, rest = host[1:].partition("]")
        good = bracket and rest.startswith(":") and rest.count(":") == 1 and not set("[]") & set(inside + rest)
        return inside if good else host
    name, colon, _ = host.rpartition(":")
    return name if colon and ":" not in name and not set("[]") & set(host) else host
