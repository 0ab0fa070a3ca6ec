"""Sockets of a service manager are taken by address; none is ignored, and none that is meant for others is taken."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from router.app.inherited_sockets import InheritedSockets
from router.app.listening import listen, listen_for_admin
from router.config.endpoint import TcpAddress
from router.config.settings import ConfigError, Settings


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "8"}, {"LISTEN_FDS": "x", "LISTEN_PID": "7"},
     {"LISTEN_FDS": "-1", "LISTEN_PID": "7"}, {"LISTEN_FDS": "0", "LISTEN_PID": "7"}],
)  # fmt: skip
def test_sockets_that_are_not_meant_for_this_process_are_not_taken(environment: dict[str, str]) -> None:
    found = InheritedSockets.from_environment(environment, pid=7)
    found.refuse_rest()
    assert found.take(TcpAddress("127.0.0.1", 1)) is None


@pytest.fixture
def tcp() -> Generator[socket.socket]:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener


def _settings(listener: socket.socket, host: str = "127.0.0.1", **sections: Any) -> Settings:
    return Settings.model_validate({"server": {"host": host, "port": listener.getsockname()[1]}, **sections})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_endpoint_takes_the_socket_with_its_address(tcp: socket.socket, host: str) -> None:
    inherited = InheritedSockets([tcp])
    found = listen(_settings(tcp, host), inherited)
    assert (found.socket, found.is_inherited) == (tcp, True)
    inherited.refuse_rest()


def test_admin_takes_its_own_unix_socket(tcp: socket.socket, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        unix.bind(str(tmp_path / "a"))
        settings = _settings(tcp, admin={"listen": f"unix:{tmp_path}/a"})
        inherited = InheritedSockets([unix, tcp])
        assert listen(settings, inherited).socket is tcp
        assert listen_for_admin(settings, inherited) is unix
        inherited.refuse_rest()


def test_a_socket_with_another_address_is_refused_by_name(tcp: socket.socket) -> None:
    host, port = tcp.getsockname()
    inherited = InheritedSockets([tcp])
    assert inherited.take(TcpAddress("127.0.0.2", port)) is None
    with pytest.raises(ConfigError, match=rf"none of them is {host}:{port}, where .*llamayard\.socket"):
        inherited.refuse_rest()


def test_without_a_passed_socket_the_router_binds_its_own(tcp: socket.socket) -> None:
    settings = _settings(tcp)
    tcp.close()
    found = listen(settings, InheritedSockets([]))
    with contextlib.closing(found.socket):
        assert not found.is_inherited


def test_a_host_that_is_no_name_matches_no_socket(tcp: socket.socket) -> None:
    port = tcp.getsockname()[1]
    assert InheritedSockets([tcp]).take(TcpAddress("a..b", port)) is None
