"""A server that can outlive the router: started through a keeper, and claimed by the next router.

`server_keeper.py` is the program between router and server, and documents what they say to each other. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from router.domain.adoption import ServerRecord
from router.domain.instance import InstanceName, InstanceSpec
from router.supervisor import server_keeper
from router.supervisor.orphan_reaper import marked_processes, run_id_of
from router.supervisor.process import INSTANCE_VARIABLE, exited_within

_SOCKETS = "servers"
_HELLO_SECONDS = 3.0
_READ_BYTES = 65536
_LEFTOVER_SECONDS = 0.2
_KEEPER_EXIT_SECONDS = 3.0
_HELLO_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How servers are kept for the next router."""

    state_directory: str
    deadline_seconds: float
    """How long a server without a router waits for the next one."""
    grace_seconds: float
    """Between SIGTERM and SIGKILL, when none has come."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A server whose keeper has accepted this router as its owner. Closing the connection lets it wait again."""

    connection: socket.socket
    keeper_pid: int
    server_pid: int
    mark: str
    version: str
    record: ServerRecord | None

    @property
    def name(self) -> InstanceName:
        return InstanceName(self.mark.partition(":")[2])


def claim_kept_servers(state_directory: str) -> tuple[Claim, ...]:
    """Claims every kept server of the state directory that has no router. Blocking.

    Removes sockets of keepers that are gone. A keeper that does not answer is killed, and its server with it.
    """
    folder = Path(state_directory, _SOCKETS)
    claims: list[Claim] = []
    for path in sorted(folder.glob("*.sock")) if folder.is_dir() else ():
        claim = _claim(path)
        if claim is not None:
            claims.append(claim)
    return tuple(claims)


def _claim(path: Path) -> Claim | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_HELLO_SECONDS)
    keeper_pid = 0
    try:
        _connect(connection, path)
        keeper_pid = _peer_pid(connection)
        hello = _read_hello(connection)
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        hello = None
    except TimeoutError:
        if keeper_pid:  # it gets no further; the parent-death signal ends its server
            with contextlib.suppress(OSError):
                os.kill(keeper_pid, signal.SIGKILL)
        hello = None
    except (OSError, ValueError):
        hello = None
    if hello is None:
        connection.close()
        return None
    record = _record(hello["record"]) if hello["protocol"] == server_keeper.PROTOCOL else None
    return Claim(connection, hello["keeper_pid"], hello["server_pid"], hello["mark"], hello["version"], record)


def _connect(connection: socket.socket, path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")  # a socket's own path may have 108 bytes at most
    finally:
        os.close(folder)


def _peer_pid(connection: socket.socket) -> int:
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
    """None if the server has a router. Reads not a byte more than the first line."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _HELLO_BYTES_MAX:
            return None
        line += byte
    return None if bytes(line) == b"busy\n" else json.loads(line)


def _record(document: Any) -> ServerRecord | None:
    """None if another version wrote it."""
    try:
        fields: dict[str, Any] = dict(document["spec"])
        fields["gpus"] = tuple(fields["gpus"])
        spec = InstanceSpec(**fields)
        return ServerRecord(spec, tuple(document["command"]), document["program"], dict(document["inherited"]))
    except (KeyError, TypeError, ValueError):
        return None


class KeptProcess:
    """A server behind its keeper, made by `spawn`, or from a `Claim` by `adopt`. Satisfies `ServerProcess`."""

    def __init__(self, connection: socket.socket, keeper_pid: int, mark: str, on_line: Callable[[str], None]) -> None:
        self.pid: int | None = None
        self.returncode: int | None = None
        self.exited = asyncio.Event()
        self.problem = ""
        """Why no other router could adopt it."""
        self._connection = connection
        self._keeper = _process_descriptor(keeper_pid)
        self._mark = mark
        self._on_line = on_line
        self._popen: subprocess.Popen[bytes] | None = None
        self._partial_line = b""
        self._closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        connection.setblocking(False)
        self._loop.add_reader(connection.fileno(), self._read)

    @classmethod
    def spawn(
        cls,
        record: ServerRecord,
        environment: Mapping[str, str],
        rules: KeepRules,
        on_line: Callable[[str], None],
    ) -> KeptProcess:
        """Starts a keeper and its server. `environment`: of the server, without the mark of its owner.

        Raises:
            OSError: no process can be created.
        """
        folder = Path(rules.state_directory, _SOCKETS)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-I", "-S", server_keeper.__file__, str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        order = {
            "command": record.command,
            "environment": dict(environment),
            "folder": str(folder),
            "instance": record.spec.name,
            "variable": INSTANCE_VARIABLE,
            "deadline_seconds": rules.deadline_seconds,
            "grace_seconds": rules.grace_seconds,
            "record": asdict(record),
        }
        with contextlib.suppress(OSError):  # a keeper that has died shows as an exit
            ours.sendall(json.dumps(order).encode() + b"\n")
        process = cls(ours, popen.pid, f"{run_id_of(popen.pid)}:{record.spec.name}", on_line)
        process._popen = popen
        return process

    @classmethod
    def adopt(cls, claim: Claim, on_line: Callable[[str], None]) -> KeptProcess:
        """Takes over for good a server that was claimed."""
        process = cls(claim.connection, claim.keeper_pid, claim.mark, on_line)
        process.pid = claim.server_pid
        process._say("adopt")
        return process

    def ready(self, version: str) -> None:
        """The server may be adopted by another router from now on."""
        self._say(f"ready {version}")

    def leave(self) -> None:
        """Leaves the server to the next router."""
        self._close()
        self._forget_keeper()
        if self._popen is not None:
            threading.Thread(target=self._popen.wait, name="keeper", daemon=True).start()  # it may end before we do

    def terminate(self) -> None:
        self._say("term")

    def kill(self) -> None:
        self._say("kill")

    async def stop(self, grace_seconds: float, kill_timeout_seconds: float = 10.0) -> bool:
        """Sends SIGTERM, then after `grace_seconds` SIGKILL to the group. Returns what `wait_gone` returns."""
        self.terminate()
        await exited_within(self.exited, grace_seconds)
        return await self.wait_gone(kill_timeout_seconds)

    async def wait_gone(self, kill_timeout_seconds: float = 10.0) -> bool:
        """Kills what is left of the server and waits until it is gone. Returns False if something is left then."""
        try:
            async with asyncio.timeout(kill_timeout_seconds):
                self.kill()
                if not await self._is_closed_within(kill_timeout_seconds / 3):
                    self._kill_keeper()
                    await self._closed.wait()
                while await asyncio.to_thread(self._kill_leftovers):
                    pass
                await asyncio.to_thread(self._wait_for_keeper)
        except TimeoutError:
            return False
        finally:
            self._close()
            self._forget_keeper()
        return True

    async def read_last_output(self) -> None:
        """Nothing to do: the keeper reports the exit after the last output."""

    # --- the keeper ------------------------------------------------------------------------------------------

    def _say(self, command: str) -> None:
        with contextlib.suppress(OSError):  # reading finds that it is gone
            self._connection.send(command.encode() + b"\n")

    async def _is_closed_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        return self._closed.is_set()

    def _kill_keeper(self) -> None:
        if self._keeper is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._keeper, signal.SIGKILL)

    def _wait_for_keeper(self) -> None:
        """Waits until it has exited: it does so at once when its server has ended."""
        if self._popen is not None:
            self._popen.wait()
        elif self._keeper is not None:
            poll = select.poll()
            poll.register(self._keeper, select.POLLIN)
            poll.poll(_KEEPER_EXIT_SECONDS * 1000.0)

    def _forget_keeper(self) -> None:
        if self._keeper is not None:
            os.close(self._keeper)
            self._keeper = None

    def _kill_leftovers(self) -> bool:
        """Whether there were any. A keeper that was killed leaves them."""
        left = marked_processes(INSTANCE_VARIABLE, self._mark)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_LEFTOVER_SECONDS)
        return bool(left)

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            self.exited.set()
            return
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._take(line[:1], line[1:])

    def _take(self, kind: bytes, rest: bytes) -> None:
        text = rest.decode("utf-8", "replace").rstrip("\r")
        if kind == b"o" and text:
            self._on_line(text)
        elif kind == b"x":
            self.returncode = int(text)
            self.exited.set()
        elif kind == b"n":
            self.problem = text
        elif kind == b"{":
            self.pid = json.loads(kind + rest)["server_pid"]

    def _close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()


def _process_descriptor(pid: int) -> int | None:
    """Names the process for good, also when its id is used again. None if it is gone."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
