"""A process on a GPU belongs to the server whose port it, or one of its ancestors, listens on."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace

import pytest

from router.domain.gpu import Gpu, GpuProcess
from router.gpu.process_owners import OwnedProcessReader
from tests.scheduler.builders import gpu


class _Reader:
    def __init__(self, gpus: tuple[Gpu, ...]) -> None:
        self.gpus = gpus
        self.is_closed = False

    def read(self) -> tuple[Gpu, ...]:
        return self.gpus

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def child() -> Generator[int]:
    """A child process of this one, which does nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def test_a_runner_has_the_ports_of_its_server(child: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = _Reader((replace(gpu(0, 10), processes=(GpuProcess(child, 7), GpuProcess(2**30, 8))),))
        owned = OwnedProcessReader(reader)
        for _ in range(2):  # the second is remembered
            ours, gone = owned.read()[0].processes
            assert server.getsockname()[1] in ours.server_ports
            assert (ours.used_bytes, gone) == (7, GpuProcess(2**30, 8))
    owned.close()
    assert reader.is_closed
