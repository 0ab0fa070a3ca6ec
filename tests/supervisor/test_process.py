"""A child process and its descendants: output, exit, stopping, killing, and the death of the router."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from router.supervisor.parent_death_shim import EXIT_NOT_EXECUTED
from router.supervisor.process import BinaryNotFound, ChildProcess, find_binary, inheritable_environment
from tests.supervisor.conftest import FAKE_SERVER, Marked, is_alive
from tests.support.waiting import eventually, eventually_sync

_ROOT = Path(__file__).parents[2]
Spawn = Callable[..., ChildProcess]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def spawn(marked: Marked, lines: list[str], tmp_path: Path) -> Spawn:
    def start(*command: str, play: str = "") -> ChildProcess:
        environment = {**marked.environment, "FAKE_DIR": str(tmp_path), "FAKE_PLAY": play}
        return ChildProcess.spawn(command or FAKE_SERVER, environment, lines.append)

    return start


def _shell(text: str) -> tuple[str, ...]:
    return ("sh", "-c", text)


async def test_output_is_read_by_lines_and_the_exit_code_is_kept(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(*_shell(r"echo one; echo two >&2; printf 'caf\303\251\r\n\377\n\nlast'; exit 7"))
    await child.exited.wait()
    assert await child.wait_gone()
    assert lines == ["one", "two", "café", "�", "last"]
    assert child.returncode == 7


async def test_a_long_line_is_split(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(sys.executable, "-c", "print('x' * 1_000_000)")
    await child.exited.wait()
    assert await child.wait_gone()
    assert lines
    assert set("".join(lines)) == {"x"}
    assert max(map(len, lines)) <= 8192


async def test_a_child_leads_its_own_session(spawn: Spawn) -> None:
    child = spawn("sleep", "600")
    assert os.getsid(child.pid) == child.pid == os.getpgid(child.pid)
    assert await child.stop(5)
    assert child.returncode == -signal.SIGTERM


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(play="deaf,mute")
    await eventually(lambda: "not listening" in lines)
    assert await child.stop(grace_seconds=0.1)
    assert child.returncode == -signal.SIGKILL


async def test_stopping_a_child_ends_its_runner(spawn: Spawn, tmp_path: Path) -> None:
    child = spawn(play="runner,mute")
    await eventually((tmp_path / "runner").exists)
    runner = int((tmp_path / "runner").read_text())
    assert is_alive(runner)
    assert await child.stop(5)
    assert not is_alive(runner)


async def test_waiting_for_a_killed_child_kills_its_runner(spawn: Spawn, tmp_path: Path) -> None:
    child = spawn(play="runner,mute")
    await eventually((tmp_path / "runner").exists)
    runner = int((tmp_path / "runner").read_text())
    os.kill(child.pid, signal.SIGKILL)
    await child.exited.wait()
    assert is_alive(runner)
    assert child.returncode == -signal.SIGKILL
    assert await child.wait_gone()
    assert not is_alive(runner)


async def test_a_child_suspended_by_sigstop_can_be_killed(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(play="deaf,mute")
    await eventually(lambda: lines)
    os.kill(child.pid, signal.SIGSTOP)
    assert await child.stop(grace_seconds=0.1)
    assert child.returncode == -signal.SIGKILL


async def test_signals_to_a_reaped_child_do_nothing(spawn: Spawn) -> None:
    child = spawn("true")
    await child.exited.wait()
    assert await child.wait_gone()
    child.kill()
    child.terminate()
    assert await child.wait_gone()
    assert child.returncode == 0


async def test_a_missing_program_is_reported_in_the_output(spawn: Spawn, lines: list[str]) -> None:
    child = spawn("/nonexistent/ollama", "serve")
    await child.exited.wait()
    assert await child.wait_gone()
    assert child.returncode == EXIT_NOT_EXECUTED
    assert lines == ["cannot execute /nonexistent/ollama: No such file or directory"]


async def test_a_process_outside_the_group_that_holds_the_output_open_does_not_delay_the_end(
    spawn: Spawn, lines: list[str]
) -> None:
    child = spawn(*_shell("setsid sh -c 'echo $$; exec sleep 600' & wait"))
    await eventually(lambda: lines)  # it has left the process group
    os.kill(child.pid, signal.SIGKILL)
    await child.exited.wait()
    assert await child.wait_gone(kill_timeout_seconds=10)
    outsider = int(lines[0])
    assert is_alive(outsider)
    os.kill(outsider, signal.SIGKILL)
    await eventually(lambda: not is_alive(outsider))


_ROUTER = """
import asyncio, sys
from router.supervisor.process import ChildProcess
async def main():
    import os
    ChildProcess.spawn(sys.argv[1:], dict(os.environ), lambda line: None)
    await asyncio.Event().wait()
if sys.flags.dev_mode:
    asyncio.run(main())
else:
    import uvloop
    uvloop.run(main())
"""


def _started_pids(folder: Path) -> list[int]:
    """Returns the pids of the fake servers that started. The file may exist before its first line does."""
    starts = folder / "starts"
    return [int(line) for line in starts.read_text().split("\n")[:-1]] if starts.exists() else []


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_the_routers_death_ends_its_child(
    marked: Marked, tmp_path: Path, loop: str, signal_number: signal.Signals
) -> None:
    flags = ["-X", "dev"] if loop == "asyncio" else []
    environment = {**marked.environment, "FAKE_DIR": str(tmp_path), "FAKE_PLAY": "mute", "PYTHONPATH": str(_ROOT)}
    router = subprocess.Popen(
        [sys.executable, *flags, "-c", _ROUTER, *FAKE_SERVER], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        (child,) = eventually_sync(lambda: _started_pids(tmp_path), what="the child")
        assert is_alive(child)
    finally:
        router.send_signal(signal_number)
        router.wait(timeout=20)
    eventually_sync(lambda: not is_alive(child), what="the child's death")


def test_a_child_whose_router_died_before_prctl_does_not_start() -> None:
    shim = _ROOT / "router" / "supervisor" / "parent_death_shim.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", shim, "15", "1", "echo", "started"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (126, b"")


def test_a_binary_is_found_by_name_or_path_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    binary = tmp_path / "ollama"
    with pytest.raises(BinaryNotFound, match=r"'ollama' is not on PATH: install Ollama, or set ollama\.binary"):
        find_binary("ollama", str(tmp_path))
    binary.write_text("#!/bin/sh\n")
    with pytest.raises(BinaryNotFound, match="is missing or not executable"):
        find_binary(str(binary), None)
    binary.chmod(0o755)
    assert find_binary("ollama", str(tmp_path)) == find_binary(str(binary), None) == str(binary)


def test_variables_that_change_how_a_server_runs_are_not_inherited() -> None:
    kept = {"HOME": "/h", "PATH": "/bin", "LD_LIBRARY_PATH": "/l", "HTTPS_PROXY": "p", "HSA_OVERRIDE_GFX_VERSION": "1"}
    dropped = dict.fromkeys(
        ("OLLAMA_HOST", "OLLAMA_DEBUG", "LLAMAYARD_SERVER__PORT", "LLAMA_ARG_FIT", "CUDA_VISIBLE_DEVICES",
         "GGML_VK_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "CUDA_DEVICE_ORDER"), "x",
    )  # fmt: skip
    assert inheritable_environment({**kept, **dropped}) == kept


async def test_the_waiting_thread_ends_without_an_error(spawn: Spawn) -> None:
    child = spawn("true")
    await asyncio.wait_for(child.exited.wait(), 20)
    assert await child.wait_gone()
