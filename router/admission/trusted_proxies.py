"""Which reverse proxies are believed about the client that they forward for. Pure.

`X-Forwarded-For` and `X-Forwarded-Host` can be sent by anybody, so they count only if the connection comes from an
address that the operator named. Nothing here depends on the client's scheme, so `X-Forwarded-Proto` is not read.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TrustedProxies:
    """
    Args:
        networks: addresses and networks such as `10.0.0.0/8`.

    Raises:
        ValueError: one is neither.
    """

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = tuple(ipaddress.ip_network(text.strip(), strict=False) for text in networks)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, address: str) -> bool:
        found = _address(address)
        return found is not None and any(
            found.version == network.version and found in network for network in self._networks
        )

    def client_address(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The client's address: the last in `X-Forwarded-For` that no trusted proxy has.

        Each proxy appends the address that it sees, so what stands left of an untrusted one is hearsay.

        Args:
            peer: the connection's other end.
            forwarded_for: the values of all `X-Forwarded-For` headers in their order.
        """
        address = peer
        hops = [hop for value in forwarded_for for hop in value.split(",")]
        while hops and self.trusts(address):
            hop = _address(_without_port(hops.pop().strip()))
            if hop is None:
                break
            address = str(hop)
        return address


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _without_port(hop: str) -> str:
    """`192.0.2.1:80` and `[2001:db8::1]:80` -> the address."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
