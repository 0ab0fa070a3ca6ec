"""One child process and everything that it starts: spawn, listen to, stop politely, then kill the whole group.

Each child leads a session and process group of its own. It is told (SIGTERM) when the router dies, so that a server can
take its runners along; what survives even that is found by `sweep`. Knows nothing of Ollama's API or instance states.

Uses `subprocess` with a waiting thread rather than asyncio's own subprocesses, for one property: the thread learns of
the death *without reaping*, so the group is killed while the kernel still reserves its number.
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

import psutil

from router.supervisor import parent_death_shim

STATE_VARIABLE = "LLAMAYARD_STATE"
INSTANCE_VARIABLE = "LLAMAYARD_INSTANCE"

_DROPPED_PREFIXES = ("OLLAMA_", "LLAMAYARD_", "LLAMA_ARG_")
_DROPPED_SUFFIXES = ("_VISIBLE_DEVICES", "_DEVICE_ORDINAL", "_DEVICE_ORDER")
_READ_BYTES = 65536
_LINE_BYTES_MAX = 8192
_GROUP_POLL_SECONDS = 0.02
_LAST_OUTPUT_SECONDS = 1.0


class BinaryNotFound(Exception):
    """There is no such executable; the text names it and the way out."""


def find_binary(binary: str, search_path: str | None) -> str:
    """The executable's absolute path, looked up on `search_path` where it is a bare name. Raises BinaryNotFound."""
    found = shutil.which(binary, path=search_path)
    if found is None:
        where = "on PATH" if os.sep not in binary else "there, or it is not executable"
        raise BinaryNotFound(f"no executable {binary!r} {where}: install Ollama, or set ollama.binary to its path")
    return str(Path(found).absolute())


def inheritable(environment: Mapping[str, str]) -> dict[str, str]:
    """The router's environment less what would steer a server behind the router's back."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_DROPPED_PREFIXES) and not name.endswith(_DROPPED_SUFFIXES)
    }


class ChildProcess:
    """A running child. Made by `spawn`; end it with `stop` or `kill`, and always await `wait_gone`."""

    def __init__(self, popen: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> None:
        self.pid = popen.pid
        self.returncode: int | None = None
        """Once it has died: its exit code, or minus the signal that ended it."""
        self._popen = popen
        self._on_line = on_line
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self.exited = asyncio.Event()
        """Set when the child itself has died. Its group may live on."""
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
        """Starts it, with `environment` as its whole environment; standard output and error come as one stream.

        Must be called in a thread that lives as long as the child shall: the kernel signals a child when the *thread*
        that started it ends. Raises OSError where no process can be made; an executable that does not run shows as a
        death with `parent_death_shim.EXIT_NOT_EXECUTED`.
        """
        wrapped = [
            sys.executable,
            "-I",
            "-S",
            parent_death_shim.__file__,
            str(int(signal.SIGTERM)),
            str(os.getpid()),
            *command,
        ]
        popen = subprocess.Popen(
            wrapped,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(popen, on_line)

    def terminate(self) -> None:
        """SIGTERM to the child alone: it takes its runners along."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group; at once, and harmless when nothing is left of it."""
        self._signal(signal.SIGKILL, whole_group=True)

    async def stop(self, polite_seconds: float, gone_seconds: float = 10.0) -> bool:
        """SIGTERM, then at the deadline SIGKILL to the group; what `wait_gone` says."""
        self.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(polite_seconds):
                await self.exited.wait()
        return await self.wait_gone(gone_seconds)

    async def wait_gone(self, gone_seconds: float = 10.0) -> bool:
        """Kills what is left of the group and waits until it is gone. False: something withstood SIGKILL till then."""
        try:
            async with asyncio.timeout(gone_seconds):
                self.kill()
                await self.exited.wait()
                while await asyncio.to_thread(_living_members, self.pid):
                    self.kill()
                    await asyncio.sleep(_GROUP_POLL_SECONDS)
                await self.last_output()
        except TimeoutError:
            return False
        finally:
            self._close_output()
            if self.exited.is_set():
                self._popen.wait()  # reaps; does not block, for it is dead
        return True

    def _signal(self, number: signal.Signals, whole_group: bool = False) -> None:
        if self._popen.returncode is not None:
            return  # reaped: the number may belong to another by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if whole_group:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    async def last_output(self) -> None:
        """Kills the group and reads to the end of output, or for a second where a stranger holds the pipe open."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_OUTPUT_SECONDS):
                await self._output_ended.wait()

    # --- death ---------------------------------------------------------------------------------------------

    def _watch_exit(self) -> None:
        died = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if died is not None:
            self.returncode = died.si_status if died.si_code == os.CLD_EXITED else -died.si_status
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
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
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._take_line(line)
        if len(self._rest) > _LINE_BYTES_MAX:
            self._take_line(self._rest)
            self._rest = b""

    def _take_line(self, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode("utf-8", "replace").rstrip("\r")
        if text:
            self._on_line(text)

    def _close_output(self) -> None:
        assert self._popen.stdout is not None
        if not self._popen.stdout.closed:
            self._loop.remove_reader(self._popen.stdout.fileno())
            self._popen.stdout.close()
            self._take_line(self._rest)
            self._rest = b""
        self._output_ended.set()


def _living_members(group: int) -> list[int]:
    """Processes of the group that are not just waiting to be reaped."""
    found: list[int] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
