"""One child and all that it starts: output, death, polite and impolite ends, and the death of the router."""

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
from router.supervisor.process import BinaryNotFound, ChildProcess, find_binary, inheritable
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


async def test_output_arrives_line_by_line_and_the_exit_code_is_known(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(*_shell(r"echo one; echo two >&2; printf 'caf\303\251\r\n\377\n\nlast'; exit 7"))
    await child.exited.wait()
    assert await child.wait_gone()
    assert lines == ["one", "two", "café", "�", "last"]
    assert child.returncode == 7


async def test_an_endless_line_is_cut_and_not_hoarded(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(sys.executable, "-c", "print('x' * 1_000_000)")
    await child.exited.wait()
    assert await child.wait_gone()
    assert lines
    assert set("".join(lines)) == {"x"}
    assert max(map(len, lines)) <= 8192


async def test_a_child_leads_a_session_of_its_own(spawn: Spawn) -> None:
    child = spawn("sleep", "600")
    assert os.getsid(child.pid) == child.pid == os.getpgid(child.pid)
    assert await child.stop(5)
    assert child.returncode == -signal.SIGTERM


async def test_a_child_that_is_deaf_to_sigterm_is_killed_at_the_deadline(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(play="deaf,mute")
    await eventually(lambda: "not listening" in lines)
    assert await child.stop(polite_seconds=0.1)
    assert child.returncode == -signal.SIGKILL


async def test_a_stopped_child_takes_its_runner_along_even_if_it_does_not_care(spawn: Spawn, tmp_path: Path) -> None:
    child = spawn(play="runner,mute")
    await eventually((tmp_path / "runner").exists)
    runner = int((tmp_path / "runner").read_text())
    assert is_alive(runner)
    assert await child.stop(5)
    assert not is_alive(runner)


async def test_a_killed_childs_runner_dies_when_the_child_is_buried(spawn: Spawn, tmp_path: Path) -> None:
    child = spawn(play="runner,mute")
    await eventually((tmp_path / "runner").exists)
    runner = int((tmp_path / "runner").read_text())
    os.kill(child.pid, signal.SIGKILL)
    await child.exited.wait()
    assert is_alive(runner)
    assert child.returncode == -signal.SIGKILL
    assert await child.wait_gone()
    assert not is_alive(runner)


async def test_a_child_that_is_stopped_by_a_signal_can_still_be_killed(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(play="deaf,mute")
    await eventually(lambda: lines)
    os.kill(child.pid, signal.SIGSTOP)
    assert await child.stop(polite_seconds=0.1)
    assert child.returncode == -signal.SIGKILL


async def test_signals_after_the_burial_hit_nobody(spawn: Spawn) -> None:
    child = spawn("true")
    await child.exited.wait()
    assert await child.wait_gone()
    child.kill()
    child.terminate()
    assert await child.wait_gone()
    assert child.returncode == 0


async def test_a_program_that_is_not_there_is_told_in_the_output(spawn: Spawn, lines: list[str]) -> None:
    child = spawn("/nonexistent/ollama", "serve")
    await child.exited.wait()
    assert await child.wait_gone()
    assert child.returncode == EXIT_NOT_EXECUTED
    assert lines == ["cannot execute /nonexistent/ollama: No such file or directory"]


async def test_a_stranger_who_holds_the_output_open_does_not_hold_up_the_burial(spawn: Spawn, lines: list[str]) -> None:
    child = spawn(*_shell("setsid sh -c 'echo $$; exec sleep 600' & wait"))
    await eventually(lambda: lines)  # it has left the group
    os.kill(child.pid, signal.SIGKILL)
    await child.exited.wait()
    assert await child.wait_gone(gone_seconds=10)
    stranger = int(lines[0])
    assert is_alive(stranger)
    os.kill(stranger, signal.SIGKILL)
    await eventually(lambda: not is_alive(stranger))


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


def _started(folder: Path) -> list[int]:
    """Numbers of the fake servers that have told of their start; the file is there before its line is."""
    starts = folder / "starts"
    return [int(line) for line in starts.read_text().split("\n")[:-1]] if starts.exists() else []


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_routers_death_ends_its_child(marked: Marked, tmp_path: Path, loop: str, number: signal.Signals) -> None:
    flags = ["-X", "dev"] if loop == "asyncio" else []
    environment = {**marked.environment, "FAKE_DIR": str(tmp_path), "FAKE_PLAY": "mute", "PYTHONPATH": str(_ROOT)}
    router = subprocess.Popen(
        [sys.executable, *flags, "-c", _ROUTER, *FAKE_SERVER], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        (child,) = eventually_sync(lambda: _started(tmp_path), what="the child")
        assert is_alive(child)
    finally:
        router.send_signal(number)
        router.wait(timeout=20)
    eventually_sync(lambda: not is_alive(child), what="the child's death")


def test_a_child_whose_router_died_before_it_was_armed_does_not_start() -> None:
    shim = _ROOT / "router" / "supervisor" / "parent_death_shim.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", shim, "15", "1", "echo", "started"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (126, b"")


def test_a_binary_is_found_by_name_or_path_and_a_missing_one_is_told(tmp_path: Path) -> None:
    binary = tmp_path / "ollama"
    with pytest.raises(BinaryNotFound, match=r"'ollama' on PATH: install Ollama, or set ollama\.binary"):
        find_binary("ollama", str(tmp_path))
    binary.write_text("#!/bin/sh\n")
    with pytest.raises(BinaryNotFound, match="there, or it is not executable"):
        find_binary(str(binary), None)
    binary.chmod(0o755)
    assert find_binary("ollama", str(tmp_path)) == find_binary(str(binary), None) == str(binary)


def test_what_would_steer_a_server_is_not_inherited() -> None:
    kept = {"HOME": "/h", "PATH": "/bin", "LD_LIBRARY_PATH": "/l", "HTTPS_PROXY": "p", "HSA_OVERRIDE_GFX_VERSION": "1"}
    dropped = dict.fromkeys(
        ("OLLAMA_HOST", "OLLAMA_DEBUG", "LLAMAYARD_SERVER__PORT", "LLAMA_ARG_FIT", "CUDA_VISIBLE_DEVICES",
         "GGML_VK_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "CUDA_DEVICE_ORDER"), "x",
    )  # fmt: skip
    assert inheritable({**kept, **dropped}) == kept


async def test_the_waiting_thread_does_not_outlive_the_loop_with_an_error(spawn: Spawn) -> None:
    child = spawn("true")
    await asyncio.wait_for(child.exited.wait(), 20)
    assert await child.wait_gone()
