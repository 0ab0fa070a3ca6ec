"""A child process and its descendants: start it, read its output, stop it, and kill its process group.

Each child leads its own session and process group. It gets SIGTERM when the router dies, so that a server can stop
its runners; `orphan_reaper` kills at the next start what survives that.

Uses `subprocess` with a waiting thread instead of asyncio's subprocesses, because the thread can wait for the exit
without reaping the child. Its process group is then killed while the kernel still reserves the group id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from router.supervisor import parent_death_shim

STATE_VARIABLE = "LLAMAYARD_STATE"
INSTANCE_VARIABLE = "LLAMAYARD_INSTANCE"

_DROPPED_PREFIXES = ("OLLAMA_", "LLAMAYARD_", "LLAMA_ARG_")
_DROPPED_NAMES = frozenset(
    ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
)
"""What a service manager tells the router alone."""
_DROPPED_SUFFIXES = ("_VISIBLE_DEVICES", "_DEVICE_ORDINAL", "_DEVICE_ORDER")
_READ_BYTES = 65536
_LINE_BYTES_MAX = 8192
_GROUP_POLL_SECONDS = 0.02
_LAST_OUTPUT_SECONDS = 1.0


class BinaryNotFound(Exception):
    """There is no such executable; the message says what to do."""


def find_binary(binary: str, search_path: str | None) -> str:
    """Returns the absolute path of the executable; a bare name is looked up on `search_path`.

    Raises:
        BinaryNotFound: there is no such executable.
    """
    path = shutil.which(binary, path=search_path)
    if path is None:
        problem = "is missing or not executable" if os.sep in binary else "is not on PATH"
        raise BinaryNotFound(f"{binary!r} {problem}: install Ollama, or set ollama.binary to its path")
    return str(Path(path).absolute())


def program_identity(program: str) -> str:
    """Identifies an executable file: another one at the same path has another identity. Empty if there is none."""
    try:
        path = Path(program).resolve()
        status = path.stat()
    except OSError:
        return ""
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def inheritable_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` without variables that would change how a server runs: only the router sets those."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(_DROPPED_PREFIXES) or name.endswith(_DROPPED_SUFFIXES) or name in _DROPPED_NAMES)
    }


class ServerProcess(Protocol):
    """The process of a server, with those that it starts."""

    returncode: int | None
    """After it exited: its exit code, or minus the number of the signal that killed it."""
    exited: asyncio.Event
    """Set when the server itself has exited. Processes that it started may still run."""

    @property
    def pid(self) -> int | None:
        """None until it is known."""
        ...

    def kill(self) -> None:
        """Sends SIGKILL to it and to what it started."""
        ...

    async def stop(self, grace_seconds: float, kill_timeout_seconds: float = 10.0) -> bool:
        """Sends SIGTERM, then after `grace_seconds` SIGKILL to the group. Returns what `wait_gone` returns."""
        ...

    async def wait_gone(self, kill_timeout_seconds: float = 10.0) -> bool:
        """Kills the rest of the group and waits until it is gone. Returns False if a process is left at the timeout."""
        ...

    async def read_last_output(self) -> None:
        """Reads, after the exit, what output is left."""
        ...


async def exited_within(exited: asyncio.Event, seconds: float) -> None:
    """Waits for the exit of a process, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await exited.wait()


class ChildProcess:
    """A running child, made by `spawn`. End it with `stop`, or with `kill` and then `wait_gone`."""

    def __init__(self, popen: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> None:
        self.pid = popen.pid
        self.returncode: int | None = None
        """After it exited: its exit code, or minus the number of the signal that killed it."""
        self._popen = popen
        self._on_line = on_line
        self._partial_line = b""
        self._loop = asyncio.get_running_loop()
        self.exited = asyncio.Event()
        """Set when the child itself has exited. Other processes of its group may still run."""
        self._output_ended = asyncio.Event()
        self._watch_output()
        threading.Thread(target=self._watch_exit, name=f"wait-{self.pid}", daemon=True).start()

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
    ) -> ChildProcess:
        """Starts a child with exactly this environment. `on_line` gets the lines of its standard output and error.

        Call it in a thread that lives at least as long as the child: the kernel sends the parent-death signal when the
        *thread* that started the child ends. A program that cannot be executed shows as an exit with
        `parent_death_shim.EXIT_NOT_EXECUTED`.

        Raises:
            OSError: no process can be created.
        """
        command_with_shim = [
            sys.executable,
            "-I",
            "-S",
            parent_death_shim.__file__,
            str(int(signal.SIGTERM)),
            str(os.getpid()),
            *command,
        ]
        popen = subprocess.Popen(
            command_with_shim,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(popen, on_line)

    def terminate(self) -> None:
        """Sends SIGTERM to the child only; it stops its own runners."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL to the whole process group; does nothing if the group is gone."""
        self._signal(signal.SIGKILL, whole_group=True)

    async def stop(self, grace_seconds: float, kill_timeout_seconds: float = 10.0) -> bool:
        """Sends SIGTERM, then after `grace_seconds` SIGKILL to the group. Returns what `wait_gone` returns."""
        self.terminate()
        await exited_within(self.exited, grace_seconds)
        return await self.wait_gone(kill_timeout_seconds)

    async def wait_gone(self, kill_timeout_seconds: float = 10.0) -> bool:
        """Kills the rest of the group and waits until it is gone. Returns False if a process is left at the timeout."""
        try:
            async with asyncio.timeout(kill_timeout_seconds):
                self.kill()
                await self.exited.wait()
                while await asyncio.to_thread(_running_members, self.pid):
                    self.kill()
                    await asyncio.sleep(_GROUP_POLL_SECONDS)
                await self.read_last_output()
        except TimeoutError:
            return False
        finally:
            self._close_output()
            if self.exited.is_set():
                self._popen.wait()  # reaps the child; does not block, because it has exited
        return True

    def _signal(self, signal_number: signal.Signals, whole_group: bool = False) -> None:
        if self._popen.returncode is not None:
            return  # reaped: the pid may belong to another process now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if whole_group:
                os.killpg(self.pid, signal_number)
            else:
                os.kill(self.pid, signal_number)

    async def read_last_output(self) -> None:
        """Kills the group and reads the remaining output, for at most a second if another process holds the pipe."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_OUTPUT_SECONDS):
                await self._output_ended.wait()

    # --- exit ----------------------------------------------------------------------------------------------

    def _watch_exit(self) -> None:
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if status is not None:
            self.returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits for the event
            self._loop.call_soon_threadsafe(self.exited.set)

    # --- output --------------------------------------------------------------------------------------------

    def _watch_output(self) -> None:
        assert self._popen.stdout is not None
        os.set_blocking(self._popen.stdout.fileno(), False)
        self._loop.add_reader(self._popen.stdout.fileno(), self._read_output)

    def _read_output(self) -> None:
        assert self._popen.stdout is not None
        try:
            data = os.read(self._popen.stdout.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_output()
            return
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._emit_line(line)
        if len(self._partial_line) > _LINE_BYTES_MAX:
            self._emit_line(self._partial_line)
            self._partial_line = b""

    def _emit_line(self, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode("utf-8", "replace").rstrip("\r")
        if text:
            self._on_line(text)

    def _close_output(self) -> None:
        assert self._popen.stdout is not None
        if not self._popen.stdout.closed:
            self._loop.remove_reader(self._popen.stdout.fileno())
            self._popen.stdout.close()
            self._emit_line(self._partial_line)
            self._partial_line = b""
        self._output_ended.set()


def _running_members(group: int) -> list[int]:
    """Returns the pids of the group's processes, without zombies."""
    pids: list[int] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                pids.append(process.pid)
    return pids
