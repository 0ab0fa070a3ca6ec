"""Starts a server and stays its parent, so that the server can outlive the router that asked for it.

Run by path: `python -I -S server_keeper.py FD`, where FD is one end of a socket pair; the other end belongs to the
router, the keeper's first owner. Uses only the standard library, without site-packages. The keeper

- passes the server's output to its owner, and drops it while it has none: a server whose output nobody reads stops;
- listens on a socket in the order's folder, where the next router can become its owner;
- ends the server when it has not been adopted `deadline_seconds` after it lost its owner, on SIGTERM, and, by the
  parent-death signal, when the keeper itself dies. Nothing is left behind for ever.

The protocol is one of lines. The first owner begins with its order, as JSON: `command`, `environment`, `folder`,
`instance`, `variable` (the environment variable that marks the server), `deadline_seconds`, `grace_seconds` and
`record`, which is passed on to later owners unread. An owner may send `ready VERSION`, `adopt`, `term` and `kill`. The
keeper begins with a hello, as JSON, or with `busy` where it has an owner; then come `oTEXT` for a line of output,
`nTEXT` for a remark of the keeper, and `xCODE` when the server has exited; then it closes the connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

PROTOCOL = 1
_PR_SET_PDEATHSIG = 1
_EXIT_NOT_EXECUTED = 127
_EXIT_PARENT_GONE = 126
_READ_BYTES = 65536
_LINE_BYTES_MAX = 8192
_PENDING_BYTES_MAX = 1 << 20
"""Output that an owner has not read; further lines are dropped."""
_LAST_OUTPUT_SECONDS = 1.0
_FLUSH_SECONDS = 2.0
_START_TIME_FIELD = 19
_BACKLOG = 8


class Keeper:
    """One server and at most one owner."""

    def __init__(self, owner: socket.socket, order: dict[str, Any]) -> None:
        self._order = order
        self._owner: socket.socket | None = owner
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._path = ""
        self._version = ""
        self._commands = b""
        self._pending = bytearray()
        self._partial = b""
        self._deadline_at: float | None = None
        self._kill_at: float | None = None
        self._output: int | None = None
        self._output_until: float | None = None
        self._returncode: int | None = None
        self._mark = f"{os.getpid()}-{_start_time()}:{order['instance']}"
        self._pid = 0

    def run(self) -> None:
        """Returns when the server and its process group have ended."""
        environment = {**self._order["environment"], self._order["variable"]: self._mark}
        self._pid, self._output = _start(self._order["command"], environment)
        wake = _watch_signals(self)
        self._selector.register(wake, selectors.EVENT_READ, lambda: wake.recv(_READ_BYTES))
        self._selector.register(self._output, selectors.EVENT_READ, self._read_output)
        problem = self._listen()
        self._take_owner(self._owner)
        if problem:
            self._tell(b"n" + problem.encode())
        self._look_after()
        while not self._is_over():
            for key, _ in self._selector.select(self._timeout()):
                key.data()
            self._look_after()
        self._finish()

    def end(self) -> None:
        """Asks the server to end; it is killed after the grace period."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._order["grace_seconds"]
            self._signal(signal.SIGTERM)

    # --- the server ------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        now = time.monotonic()
        if self._returncode is None:
            status = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                self._returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
                self._output_until = now + _LAST_OUTPUT_SECONDS
                self._kill_group()  # it is not reaped yet, so that nothing else can have its id
        if self._returncode is not None:
            self._kill_at = self._deadline_at = None
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill_group()
            self._kill_at = now + self._order["grace_seconds"]
        if self._deadline_at is not None and now >= self._deadline_at:
            self._deadline_at = None
            self.end()

    def _is_over(self) -> bool:
        if self._returncode is None:
            return False
        return self._output is None or (self._output_until or 0.0) <= time.monotonic()

    def _timeout(self) -> float | None:
        times = [at for at in (self._deadline_at, self._kill_at, self._output_until) if at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _signal(self, number: signal.Signals) -> None:
        if self._returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # it may not lead its group yet

    def _read_output(self) -> None:
        assert self._output is not None
        data = os.read(self._output, _READ_BYTES)
        if not data:
            self._selector.unregister(self._output)
            os.close(self._output)
            self._output = None
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._tell(b"o" + line[:_LINE_BYTES_MAX])
        if len(self._partial) > _LINE_BYTES_MAX:
            self._tell(b"o" + self._partial[:_LINE_BYTES_MAX])
            self._partial = b""

    def _finish(self) -> None:
        os.waitpid(self._pid, 0)
        if self._path:
            with contextlib.suppress(OSError):
                Path(self._path).unlink()
        if self._partial:
            self._tell(b"o" + self._partial[:_LINE_BYTES_MAX])
        self._tell(b"x%d" % (self._returncode or 0), even_if_full=True)
        if self._owner is not None:
            self._owner.settimeout(_FLUSH_SECONDS)
            with contextlib.suppress(OSError):
                self._owner.sendall(self._pending)

    # --- owners ----------------------------------------------------------------------------------------------

    def _listen(self) -> str:
        """Listens in the folder. Returns why it cannot; then no router can adopt the server."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            folder = os.open(self._order["folder"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            # By its descriptor: a socket's path may have 108 bytes at most.
            path, new = (f"/proc/self/fd/{folder}/{os.getpid()}{suffix}" for suffix in (".sock", ".new"))
            listener.bind(new)
            listener.listen(_BACKLOG)
            Path(new).rename(path)  # only now: a router takes a socket that refuses for one that was left
        except OSError as error:
            listener.close()
            return f"cannot listen in {self._order['folder']}: {error.strerror}"
        listener.setblocking(False)
        self._listener, self._path = listener, path
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        return ""

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if self._owner is not None:
            self._serve_owner()  # it may have gone before this one came
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid != os.getuid() or self._owner is not None:
            with contextlib.suppress(OSError):
                connection.sendall(b"busy\n")
            connection.close()
            return
        self._take_owner(connection)

    def _take_owner(self, connection: socket.socket | None) -> None:
        assert connection is not None
        connection.setblocking(False)
        self._owner, self._commands = connection, b""
        self._pending.clear()
        self._selector.register(connection, selectors.EVENT_READ, self._serve_owner)
        hello = {
            "protocol": PROTOCOL,
            "keeper_pid": os.getpid(),
            "server_pid": self._pid,
            "mark": self._mark,
            "version": self._version,
            "record": self._order["record"],
        }
        self._tell(json.dumps(hello).encode(), even_if_full=True)

    def _tell(self, line: bytes, even_if_full: bool = False) -> None:
        if self._owner is None or (len(self._pending) > _PENDING_BYTES_MAX and not even_if_full):
            return
        self._pending += line + b"\n"
        self._send()

    def _send(self) -> None:
        assert self._owner is not None
        try:
            del self._pending[: self._owner.send(self._pending)]
        except BlockingIOError:
            pass
        except OSError:
            return  # it is gone, which reading finds
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._pending else 0)
        self._selector.modify(self._owner, events, self._serve_owner)

    def _serve_owner(self) -> None:
        assert self._owner is not None
        if self._pending:
            self._send()
        try:
            data = self._owner.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_owner()
            return
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            self._obey(line.decode("utf-8", "replace"))

    def _lose_owner(self) -> None:
        assert self._owner is not None
        self._selector.unregister(self._owner)
        self._owner.close()
        self._owner = None
        self._pending.clear()
        if self._listener is None or not self._version:
            self.end()  # nobody could adopt it
        elif self._deadline_at is None:
            self._deadline_at = time.monotonic() + self._order["deadline_seconds"]

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "ready":
            self._version = argument
        elif command == "adopt":
            self._deadline_at = None
        elif command == "term":
            self._signal(signal.SIGTERM)
        elif command == "kill":
            self._kill_group()


def _start(command: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Starts the server in a session of its own. Returns its pid and the end of its output to read from."""
    reading, writing = os.pipe()
    libc, keeper_pid = ctypes.CDLL(None), os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.setsid()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != keeper_pid:
            os._exit(_EXIT_PARENT_GONE)
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"cannot execute {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(_EXIT_NOT_EXECUTED)


def _watch_signals(keeper: Keeper) -> socket.socket:
    """Returns a socket that is readable when a signal has come."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())

    def wake(number: int, frame: FrameType | None) -> None:
        del number, frame

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        keeper.end()

    signal.signal(signal.SIGCHLD, wake)
    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return reading


def _start_time() -> str:
    """Of this process, in clock ticks since boot."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    return stat.rpartition(")")[2].split()[_START_TIME_FIELD]


def _read_order(owner: socket.socket) -> dict[str, Any] | None:
    """None if the router is gone."""
    data = b""
    while not data.endswith(b"\n"):
        piece = owner.recv(_READ_BYTES)
        if not piece:
            return None
        data += piece
    return json.loads(data)


def main(arguments: list[str]) -> int:
    owner = socket.socket(fileno=int(arguments[0]))
    owner.set_inheritable(False)
    order = _read_order(owner)
    if order is None:
        return _EXIT_PARENT_GONE
    Keeper(owner, order).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
