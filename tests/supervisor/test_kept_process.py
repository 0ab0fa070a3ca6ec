"""The keeper of a server, and what routers say to it: real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest

from router.domain.adoption import ServerRecord
from router.domain.instance import InstanceName, InstanceSpec
from router.supervisor.kept_process import KeepRules, KeptProcess, claim_kept_servers
from router.supervisor.orphan_reaper import reap_orphans, state_mark
from tests.supervisor.conftest import FAKE_SERVER, Marked, is_alive
from tests.support.waiting import eventually, eventually_sync

Start = Callable[..., KeptProcess]

_TALKS = "import itertools, sys\nfor n in itertools.count(): print('x' * 1000, n, flush=True)\n"
"""A server that fills any pipe that nobody reads."""


def _spec(name: str = "a") -> InstanceSpec:
    return InstanceSpec(InstanceName(name), (), "http://127.0.0.1:9")


@pytest.fixture
def start(marked: Marked, tmp_path: Path) -> Start:
    """Starts a server with a keeper; `lines` gets its output."""

    def spawn(
        *command: str, lines: list[str] | None = None, deadline_seconds: float = 600.0, play: str = ""
    ) -> KeptProcess:
        rules = KeepRules(str(tmp_path / "state"), deadline_seconds, grace_seconds=0.5)
        environment = {
            **marked.environment, **state_mark(str(tmp_path / "state")), "FAKE_DIR": str(tmp_path),
            "FAKE_PLAY": play, "OLLAMA_HOST": "127.0.0.1:0",
        }  # fmt: skip
        record = ServerRecord(_spec(), command or FAKE_SERVER, "program")
        output = [] if lines is None else lines
        return KeptProcess.spawn(record, environment, rules, output.append)

    return spawn


async def _left(process: KeptProcess, version: str = "1") -> int:
    """The pid of a server that has been left to the next router."""
    await eventually(lambda: process.pid is not None, what="its pid")
    process.ready(version)
    process.leave()
    assert process.pid is not None
    return process.pid


async def test_output_and_exit_code_arrive_in_order(start: Start) -> None:
    lines: list[str] = []
    process = start(lines=lines, play="exit3")
    await process.exited.wait()
    assert (process.returncode, lines) == (3, ["first line", "Error: something is wrong"])
    assert await process.wait_gone()


async def test_a_program_that_is_missing_shows_as_an_exit(start: Start) -> None:
    lines: list[str] = []
    process = start("/no/such/program", lines=lines)
    await process.exited.wait()
    assert (process.returncode, lines) == (127, ["cannot execute /no/such/program: No such file or directory"])
    assert await process.wait_gone()


async def test_a_deaf_server_and_its_runner_are_killed(start: Start, tmp_path: Path) -> None:
    process = start(play="runner,deaf,mute")
    await eventually((tmp_path / "runner").exists, what="the runner")
    assert await process.stop(grace_seconds=0.2)
    assert process.returncode == -signal.SIGKILL
    assert not is_alive(int((tmp_path / "runner").read_text()))


async def test_the_next_router_takes_over_what_was_left(start: Start, tmp_path: Path) -> None:
    pid = await _left(start(sys.executable, "-c", _TALKS), "0.34.0")
    (claim,) = claim_kept_servers(str(tmp_path / "state"))
    assert (claim.server_pid, claim.name, claim.version) == (pid, "a", "0.34.0")
    assert claim.record == ServerRecord(_spec(), (sys.executable, "-c", _TALKS), "program")
    assert claim_kept_servers(str(tmp_path / "state")) == ()  # it has a router
    lines: list[str] = []
    process = KeptProcess.adopt(claim, lines.append)
    await eventually(lambda: len(lines) > 100, what="its output")
    assert await process.stop(grace_seconds=5.0)
    assert not is_alive(pid)


async def test_a_server_that_was_never_ready_ends_with_its_router(start: Start, marked: Marked) -> None:
    process = start()
    await eventually(lambda: process.pid is not None, what="its pid")
    process.leave()
    await eventually(lambda: not marked.alive(), what="its end")


async def test_a_deaf_server_that_nobody_claims_is_killed_at_the_deadline(
    start: Start, marked: Marked, tmp_path: Path
) -> None:
    pid = await _left(start(play="deaf,mute", deadline_seconds=0.3))
    assert is_alive(pid)
    await eventually(lambda: not marked.alive(), what="its end and that of its keeper")
    assert list((tmp_path / "state/servers").iterdir()) == []


async def test_claims_that_come_to_nothing_do_not_put_the_deadline_off(
    start: Start, marked: Marked, tmp_path: Path
) -> None:
    await _left(start(deadline_seconds=1.0))
    (claim,) = claim_kept_servers(str(tmp_path / "state"))
    await eventually(lambda: not marked.alive(), what="its end, though it is claimed")
    claim.connection.close()


async def test_a_server_ends_when_its_keeper_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(play="runner,mute")
    await eventually((tmp_path / "runner").exists, what="the runner")
    assert process.pid is not None
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    parent.kill()
    await process.exited.wait()
    assert await process.wait_gone()
    assert not is_alive(process.pid)
    assert not is_alive(int((tmp_path / "runner").read_text()))


async def test_what_a_killed_keeper_and_a_dead_router_leave_is_reaped(start: Start, tmp_path: Path) -> None:
    process = start(play="runner,deaf,mute")
    await eventually((tmp_path / "runner").exists, what="the runner")
    assert process.pid is not None
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    assert reap_orphans(str(tmp_path / "state")) == ()  # its keeper looks after it
    process.ready("1")
    process.leave()
    assert reap_orphans(str(tmp_path / "state")) == ()
    parent.kill()
    parent.wait(timeout=20)
    runner = int((tmp_path / "runner").read_text())
    assert {orphan.pid for orphan in reap_orphans(str(tmp_path / "state"))} == {process.pid, runner}


async def test_a_hung_keeper_does_not_keep_a_router_from_starting(start: Start, tmp_path: Path) -> None:
    pid = await _left(start())
    parent = psutil.Process(pid).parent()
    assert parent is not None
    parent.suspend()
    assert claim_kept_servers(str(tmp_path / "state")) == ()
    await eventually(lambda: not is_alive(pid), what="the server's end")


async def test_a_hung_keeper_does_not_keep_a_server_from_being_ended(start: Start) -> None:
    process = start()
    await eventually(lambda: process.pid is not None, what="its pid")
    assert process.pid is not None
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    parent.suspend()
    assert await process.wait_gone(kill_timeout_seconds=3.0)
    assert not is_alive(process.pid)


async def test_without_a_socket_a_server_is_not_kept(start: Start, marked: Marked, tmp_path: Path) -> None:
    (tmp_path / "state/servers").mkdir(parents=True)
    process = start(play="mute")
    await eventually(lambda: process.pid is not None, what="its pid")
    assert process.problem == ""
    await process.wait_gone()
    (tmp_path / "state/servers").rmdir()
    long = tmp_path / "state" / "servers"
    long.symlink_to("/proc")  # nothing can be created there
    process = start(play="mute")
    await eventually(lambda: process.problem, what="the remark")
    assert "cannot listen in" in process.problem
    await _left(process)
    await eventually(lambda: not marked.alive(), what="its end")


def test_a_socket_that_was_left_is_removed_and_whoever_has_its_pid_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    folder.mkdir()
    other = subprocess.Popen(["sleep", "600"])
    try:
        here = Path.cwd()
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(folder)  # a socket's own path may have 108 bytes at most
            listener.bind(f"{other.pid}.sock")
            os.chdir(here)
        assert claim_kept_servers(str(tmp_path)) == ()
        assert list(folder.iterdir()) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(timeout=10)


@pytest.fixture
def short_folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_socket_of_something_else_is_left_alone(short_folder: Path) -> None:
    folder = short_folder / "servers"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "1.sock"))
        listener.listen()
        answer = subprocess.Popen(
            [sys.executable, "-c", "import socket\n"
             f"s = socket.socket(fileno={listener.fileno()})\nc, _ = s.accept()\nc.sendall(b'HTTP/1.1 400\\n')\n"],
            pass_fds=(listener.fileno(),),
        )  # fmt: skip
        assert claim_kept_servers(str(short_folder)) == ()
        answer.wait(timeout=20)
        assert (folder / "1.sock").exists()
    eventually_sync(lambda: answer.returncode == 0, what="its end")
