"""What a killed router left is found and killed, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from router.domain.instance import InstanceName
from router.supervisor.orphan_reaper import marks, run_id, sweep
from tests.supervisor.conftest import FAKE_SERVER, Marked, is_alive
from tests.support.waiting import eventually_sync

_DEAD_RUN = "999999999-1"
Leave = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def leave(marked: Marked) -> Generator[Leave]:
    """Starts a process that bears marks, or does not."""
    started: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = ["sleep", "600"]
        started.append(subprocess.Popen(command, env={**marked.environment, **environment}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


def test_a_dead_routers_child_is_killed_and_named(leave: Leave, tmp_path: Path) -> None:
    process = leave(marks(str(tmp_path), _DEAD_RUN, InstanceName("gpu0")))
    (swept,) = sweep(str(tmp_path))
    assert (swept.pid, swept.instance, swept.command) == (process.pid, "gpu0", "sleep 600")
    assert not is_alive(process.pid)
    assert sweep(str(tmp_path)) == ()


def test_a_living_routers_child_is_left_alone(leave: Leave, tmp_path: Path) -> None:
    process = leave(marks(str(tmp_path), run_id(), InstanceName("gpu0")))
    assert sweep(str(tmp_path)) == ()
    assert process.poll() is None


def test_a_router_with_the_number_of_a_dead_one_is_not_taken_for_it(leave: Leave, tmp_path: Path) -> None:
    reused = f"{os.getpid()}-1"
    leave(marks(str(tmp_path), reused, InstanceName("gpu0")))
    assert len(sweep(str(tmp_path))) == 1


def test_children_of_another_state_directory_and_unmarked_ones_are_left_alone(leave: Leave, tmp_path: Path) -> None:
    others = [
        leave(marks(str(tmp_path / "other"), _DEAD_RUN, InstanceName("gpu0"))),
        leave({"LLAMAYARD_STATE": str(tmp_path)}),
        leave({"LLAMAYARD_INSTANCE": f"{_DEAD_RUN}:gpu0"}),
        leave({}),
    ]
    assert sweep(str(tmp_path)) == ()
    assert [process.poll() for process in others] == [None] * 4


def test_a_state_directory_is_the_same_by_any_path_to_it(leave: Leave, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    leave(marks(str(tmp_path / "link"), _DEAD_RUN, InstanceName("a")))
    assert len(sweep(str(tmp_path / "real" / ".." / "real"))) == 1


_ROUTER = """
import asyncio, os, sys
from router.supervisor.process import ChildProcess
from router.supervisor.orphan_reaper import marks, run_id
async def main():
    environment = {**os.environ, **marks(sys.argv[1], run_id(), "gpu0")}
    ChildProcess.spawn(sys.argv[2:], environment, lambda line: None)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_runners_of_a_killed_routers_servers_are_found(marked: Marked, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    root = str(Path(__file__).parents[2])
    environment = {**marked.environment, "FAKE_DIR": str(tmp_path), "FAKE_PLAY": "runner,deaf,mute", "PYTHONPATH": root}
    router = subprocess.Popen([sys.executable, "-c", _ROUTER, state, *FAKE_SERVER], env=environment)
    eventually_sync((tmp_path / "runner").exists, what="the runner")
    server, runner = int((tmp_path / "starts").read_text()), int((tmp_path / "runner").read_text())
    assert sweep(state) == ()
    router.kill()
    router.wait(timeout=20)
    assert is_alive(runner)
    assert {swept.pid for swept in sweep(state)} == {server, runner}
    assert not is_alive(server)
    assert not is_alive(runner)
