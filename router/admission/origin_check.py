"""The checks of Host and Origin that an Ollama server makes itself: which web pages may call this endpoint.

A proxy sets Host, so the server behind it cannot distinguish a page that reached it by DNS rebinding from a local
program. The proxy must therefore check it. Responses match Ollama's down to the headers (`cors-*`, `host-*` and
`options-no-origin` in the recordings). It authenticates nobody: requests without Origin pass.

Sources: allowedHostsMiddleware in server/routes.go and AllowedOrigins in envconfig/config.go (v0.11.4 to v0.24);
gin-contrib/cors v1.7.2, whose order (Origin first, then Host) and pattern matching are kept.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import psutil

from router.http1.response_writer import HeaderPairs, LocalResponse

ALLOW_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    "X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
    "X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
ALLOW_METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
MAX_AGE_SECONDS = 43200

_ORIGIN_KEY, _HOST_KEY = "server.cors_origins", "server.allowed_hosts"
_VALUE_SHOWN_MAX = 200

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_PRIVATE_NETWORKS = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
_UNSPECIFIED = frozenset(map(ipaddress.ip_address, ("0.0.0.0", "::")))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Verdict:
    """A `response` ends the request; otherwise `headers` belong on whatever response the request gets."""

    response: LocalResponse | None = None
    headers: HeaderPairs = ()
    refusal: str = ""
    """Why the request is refused, for the log: names the header and its value."""


class Origins:
    """The origins that may call, from patterns with at most one `*`.

    Raises:
        ValueError: a pattern with more than one `*`.
    """

    __slots__ = ("_exact", "_wildcards", "allow_all")

    def __init__(self, patterns: Iterable[str]) -> None:
        given = [pattern.strip() for pattern in patterns]
        invalid = [pattern for pattern in given if pattern.count("*") > 1]
        if invalid:
            raise ValueError(f"server.cors_origins: only one * is allowed in {invalid[0]!r}")
        self.allow_all = "*" in given
        self._exact = frozenset(pattern.lower() for pattern in given)
        self._wildcards = tuple((head, tail) for head, star, tail in (p.partition("*") for p in given) if star)

    def allow(self, origin: str) -> bool:
        """Matches as gin-contrib/cors does: plain origins in lower case, patterns by prefix and suffix as written."""
        if self.allow_all or origin in self._exact:
            return True
        return any(origin.startswith(head) and origin.endswith(tail) for head, tail in self._wildcards)


class OriginPolicy:
    """Judges one request's Host and Origin.

    Args:
        own_names: the machine's names and addresses.
    """

    __slots__ = ("_bound_to_loopback", "_origins", "_own_names")

    def __init__(self, origins: Origins, bound_to_loopback: bool, own_names: Collection[str]) -> None:
        self._origins = origins
        self._bound_to_loopback = bound_to_loopback
        self._own_names = frozenset(name.lower() for name in own_names)

    def judge(self, method: str, host: str | None, origin: str | None, allow: Sequence[str] = ()) -> Verdict:
        """`allow`: the methods of the request's route, empty for an unknown path."""
        host = host or ""
        # Ollama routes first, so the response keeps the Allow header that routing added.
        routed: HeaderPairs = (("Allow", ", ".join(allow)),) if allow and method not in allow else ()
        cross = origin if origin and origin not in (f"http://{host}", f"https://{host}") else None
        headers: HeaderPairs = ()
        if cross is not None:
            if not self._origins.allow(cross):
                return Verdict(
                    LocalResponse(403, routed), refusal=f"Origin {cross[:_VALUE_SHOWN_MAX]!r} ({_ORIGIN_KEY})"
                )
            if method == "OPTIONS":
                return Verdict(LocalResponse(204, (*self._preflight(cross), *routed)))
            headers = self._allowed(cross)
        if not host_allowed(host, self._bound_to_loopback, self._own_names):
            return Verdict(
                LocalResponse(403, (*headers, *routed)), refusal=f"Host {host[:_VALUE_SHOWN_MAX]!r} ({_HOST_KEY})"
            )
        return self._options(host, routed) if method == "OPTIONS" else Verdict(None, headers)

    def _allowed(self, origin: str) -> HeaderPairs:
        if self._origins.allow_all:
            return (("Access-Control-Allow-Origin", "*"),)
        return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))

    def _preflight(self, origin: str) -> HeaderPairs:
        all_origins = self._origins.allow_all
        vary = () if all_origins else ("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        return (
            ("Access-Control-Allow-Headers", ALLOW_HEADERS),
            ("Access-Control-Allow-Methods", ALLOW_METHODS),
            ("Access-Control-Allow-Origin", "*" if all_origins else origin),
            ("Access-Control-Max-Age", str(MAX_AGE_SECONDS)),
            *(("Vary", name) for name in vary),
        )

    def _options(self, host: str, routed: HeaderPairs) -> Verdict:
        """OPTIONS that is not a preflight: on loopback 204 for host names, and 405 (or 404) for addresses."""
        name = _without_port(host)
        if self._bound_to_loopback and not _is_local_address(name, self._own_names):
            return Verdict(LocalResponse(204, routed))
        return Verdict(method_not_allowed(routed[0][1].split(", ")) if routed else not_found())


def host_allowed(host_header: str, bound_to_loopback: bool, own_names: Collection[str]) -> bool:
    """Whether a Host header names this machine. On a listener that is open to the network any does, as in Ollama.

    Args:
        own_names: the machine's names and addresses, in lower case.
    """
    if not bound_to_loopback:
        return True
    host = _without_port(host_header)
    return _is_local_address(host, own_names) or _is_local_name(host.lower(), own_names)


def machine_names() -> frozenset[str]:
    """This machine's current host name and interface addresses, in lower case."""
    addresses = (one.address for interface in psutil.net_if_addrs().values() for one in interface)
    return frozenset((socket.gethostname().lower(), *(address.partition("%")[0].lower() for address in addresses)))


def is_loopback(host: str) -> bool:
    """Whether a listening address is reachable from this machine only."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def not_found() -> LocalResponse:
    """Ollama's response to an unknown path."""
    return LocalResponse(404, (("Content-Type", "text/plain"),), b"404 page not found")


def method_not_allowed(allow: Sequence[str]) -> LocalResponse:
    """Ollama's response to a known path with the wrong method."""
    return LocalResponse(405, (("Allow", ", ".join(allow)), ("Content-Type", "text/plain")), b"405 method not allowed")


def _is_local_name(name: str, own_names: Collection[str]) -> bool:
    return name in ("", "localhost") or name in own_names or name.endswith(_LOCAL_SUFFIXES)


def _is_local_address(host: str, own_names: Collection[str]) -> bool:
    address = _address(host)
    if address is None:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address_v4 = mapped or address
    if address_v4.is_loopback or address in _UNSPECIFIED or str(address) in own_names:
        return True
    return any(address_v4 in network for network in _PRIVATE_NETWORKS)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _without_port(host: str) -> str:
    """The host as Go's net.SplitHostPort splits it; all of `host` where that fails."""
    if host.startswith("["):
        inside, bracket, rest = host[1:].partition("]")
        valid = bracket and rest.startswith(":") and rest.count(":") == 1 and not set("[]") & set(inside + rest)
        return inside if valid else host
    name, colon, _ = host.rpartition(":")
    return name if colon and ":" not in name and not set("[]") & set(host) else host
