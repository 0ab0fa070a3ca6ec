"""Free loopback ports for instances."""

from __future__ import annotations

import socket

import pytest

from router.supervisor.ports import NoFreePort, free_ports


def test_ports_are_distinct_and_below_the_ephemeral_range() -> None:
    ports = free_ports(16)
    assert len(set(ports)) == 16
    assert all(20_000 <= port < 32_768 for port in ports)


def test_a_port_in_use_is_skipped() -> None:
    (first,) = free_ports(1, seed=3)
    with socket.create_server(("127.0.0.1", first)):
        assert first not in free_ports(2, seed=3)


def test_too_few_free_ports_are_an_error_after_the_whole_range_was_tried() -> None:
    with pytest.raises(NoFreePort, match="of 100000 ports are free between 20000 and 32767"):
        free_ports(100_000)
