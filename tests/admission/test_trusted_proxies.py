"""Only a named proxy is believed, and only about what it saw itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.trusted_proxies import TrustedProxies

TRUSTED = TrustedProxies(("10.0.0.0/8", "192.0.2.1", "2001:db8::/32"))


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),  # the client wrote the first
        ("10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),  # as a header of its own
        ("10.0.0.1", ["203.0.113.9, 10.9.9.9"], "203.0.113.9"),  # two trusted proxies
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:dead::1]:4711"], "2001:dead::1"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("2001:db8::5", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, nonsense"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("203.0.113.1", ["1.2.3.4"], "203.0.113.1"),  # no proxy of ours
        ("192.0.2.2", ["1.2.3.4"], "192.0.2.2"),
        ("", ["1.2.3.4"], ""),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(
    peer: str, forwarded_for: list[str], client: str
) -> None:
    assert TRUSTED.client_address(peer, forwarded_for) == client


def test_without_proxies_nobody_is_believed() -> None:
    assert not TrustedProxies()
    assert TrustedProxies().client_address("10.0.0.1", ["1.2.3.4"]) == "10.0.0.1"


@given(st.text(max_size=40), st.lists(st.text(max_size=60), max_size=4))
def test_any_header_is_read(peer: str, forwarded_for: list[str]) -> None:
    assert isinstance(TRUSTED.client_address(peer, forwarded_for), str)


@given(st.lists(st.ip_addresses(v=4).map(str), max_size=4))
def test_what_a_client_writes_in_front_changes_nothing(written: list[str]) -> None:
    values = [", ".join([*written, "203.0.113.9"])]
    assert TRUSTED.client_address("10.0.0.1", values) == "203.0.113.9"
