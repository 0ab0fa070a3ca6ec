"""The service manager is told when the router is ready and when it stops, and hears from it regularly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from router.app.service_manager import ServiceManager


@pytest.fixture
def listener(tmp_path: Path) -> Generator[socket.socket]:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as found:
        found.bind(str(tmp_path / "notify"))
        found.settimeout(10.0)
        yield found


def _manager(listener: socket.socket, **environment: str) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": listener.getsockname(), **environment}, pid=7)


def test_readiness_and_stop_are_reported(listener: socket.socket) -> None:
    manager = _manager(listener)
    manager.ready("listening on http://x")
    assert listener.recv(1024) == b"READY=1\nSTATUS=listening on http://x"
    manager.stopping()
    assert listener.recv(1024).startswith(b"STOPPING=1\n")


async def test_the_watchdog_hears_from_the_router_again_and_again(listener: socket.socket) -> None:
    task = asyncio.create_task(_manager(listener, WATCHDOG_USEC="20000", WATCHDOG_PID="7").keep_watchdog())
    for _ in range(3):
        assert await asyncio.to_thread(listener.recv, 1024) == b"WATCHDOG=1"
    task.cancel()


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "8"}]
)
async def test_without_a_watchdog_that_is_meant_for_it_nothing_is_sent(
    listener: socket.socket, environment: dict[str, str]
) -> None:
    await _manager(listener, **environment).keep_watchdog()
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(1024)


def test_an_abstract_socket_is_reached() -> None:
    name = "\0llamayard-test-notify"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(name)
        listener.settimeout(10.0)
        ServiceManager({"NOTIFY_SOCKET": "@" + name[1:]}, pid=7).status("well")
        assert listener.recv(1024) == b"STATUS=well"


def test_without_a_service_manager_or_when_it_is_gone_nothing_fails(tmp_path: Path) -> None:
    assert not ServiceManager({}, pid=7).is_present
    ServiceManager({}, pid=7).ready("")
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, pid=7).ready("")
