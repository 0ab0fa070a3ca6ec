"""Processes that a killed router left behind are found and killed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from router.domain.instance import InstanceName
from router.supervisor.orphan_reaper import process_marks, reap_orphans, run_id
from tests.supervisor.conftest import FAKE_SERVER, Marked, is_alive
from tests.support.waiting import eventually_sync

_DEAD_RUN = "999999999-1"
StartProcess = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_process(marked: Marked) -> Generator[StartProcess]:
    """Starts a process with this environment; it is killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = ["sleep", "600"]
        started.append(subprocess.Popen(command, env={**marked.environment, **environment}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


def test_a_dead_routers_child_is_killed_and_reported(start_process: StartProcess, tmp_path: Path) -> None:
    process = start_process(process_marks(str(tmp_path), _DEAD_RUN, InstanceName("gpu0")))
    (orphan,) = reap_orphans(str(tmp_path))
    assert (orphan.pid, orphan.instance, orphan.command) == (process.pid, "gpu0", "sleep 600")
    assert not is_alive(process.pid)
    assert reap_orphans(str(tmp_path)) == ()


def test_a_running_routers_child_is_not_killed(start_process: StartProcess, tmp_path: Path) -> None:
    process = start_process(process_marks(str(tmp_path), run_id(), InstanceName("gpu0")))
    assert reap_orphans(str(tmp_path)) == ()
    assert process.poll() is None


def test_a_process_that_reused_the_dead_routers_pid_is_not_taken_for_the_router(
    start_process: StartProcess, tmp_path: Path
) -> None:
    reused = f"{os.getpid()}-1"
    start_process(process_marks(str(tmp_path), reused, InstanceName("gpu0")))
    assert len(reap_orphans(str(tmp_path))) == 1


def test_processes_of_another_state_directory_or_without_marks_are_not_killed(
    start_process: StartProcess, tmp_path: Path
) -> None:
    others = [
        start_process(process_marks(str(tmp_path / "other"), _DEAD_RUN, InstanceName("gpu0"))),
        start_process({"LLAMAYARD_STATE": str(tmp_path)}),
        start_process({"LLAMAYARD_INSTANCE": f"{_DEAD_RUN}:gpu0"}),
        start_process({}),
    ]
    assert reap_orphans(str(tmp_path)) == ()
    assert [process.poll() for process in others] == [None] * 4


def test_a_state_directory_is_recognised_by_any_path_to_it(start_process: StartProcess, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    start_process(process_marks(str(tmp_path / "link"), _DEAD_RUN, InstanceName("a")))
    assert len(reap_orphans(str(tmp_path / "real" / ".." / "real"))) == 1


_ROUTER = """
import asyncio, os, sys
from router.supervisor.process import ChildProcess
from router.supervisor.orphan_reaper import process_marks, run_id
async def main():
    environment = {**os.environ, **process_marks(sys.argv[1], run_id(), "gpu0")}
    ChildProcess.spawn(sys.argv[2:], environment, lambda line: None)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_servers_and_runners_of_a_killed_router_are_killed(marked: Marked, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    root = str(Path(__file__).parents[2])
    environment = {**marked.environment, "FAKE_DIR": str(tmp_path), "FAKE_PLAY": "runner,deaf,mute", "PYTHONPATH": root}
    router = subprocess.Popen([sys.executable, "-c", _ROUTER, state, *FAKE_SERVER], env=environment)
    eventually_sync((tmp_path / "runner").exists, what="the runner")
    server, runner = int((tmp_path / "starts").read_text()), int((tmp_path / "runner").read_text())
    assert reap_orphans(state) == ()
    router.kill()
    router.wait(timeout=20)
    assert is_alive(runner)
    assert {orphan.pid for orphan in reap_orphans(state)} == {server, runner}
    assert not is_alive(server)
    assert not is_alive(runner)
