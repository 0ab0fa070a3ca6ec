"""One runner child of the emulated server, seen from the server: started, loaded, run, killed.

The child is `router.lab.emulator.runner`; they talk in lines of JSON over a socket pair. The end of that socket is the
end of the child. It schedules nothing and knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[3]

_DIED = "the runner died"


class RunnerLostError(Exception):
    """The runner is gone."""


class Sequence:
    """One prompt in the runner's batch, and the tokens that come of it."""

    def __init__(self, key: int, process: RunnerProcess) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the runner has nothing to do with it any more."""
        self._key = key
        self._process = process
        self._count = 0
        self._came = asyncio.Event()

    async def token(self) -> bool:
        """Waits for one token; False once there are no more.

        Raises:
            RunnerLostError: the runner died first.
        """
        while self._count == 0:
            if self.over.done():
                if not self._process.is_alive:
                    raise RunnerLostError
                return False
            self._came.clear()
            await self._came.wait()
        self._count -= 1
        return True

    def cancel(self) -> None:
        """No more tokens are wanted."""
        if not self.over.done():
            self._process.cancel(self._key)

    def add(self) -> None:
        self._count += 1
        self._came.set()

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
        self._came.set()


class RunnerProcess(asyncio.Protocol):
    """A live runner. Made by `start`; everything else may be called until `lost`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.pid = 0
        self._transport: asyncio.Transport | None = None
        self._loading: asyncio.Future[str | None] | None = None
        self._sequences: dict[int, Sequence] = {}
        self._pong: asyncio.Future[None] | None = None
        self._unread = b""
        self._next_id = 0
        self._child: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(cls, blob: Path, port: int, rig_dir: Path | None, environment: Mapping[str, str]) -> RunnerProcess:
        """A new child in the server's own process group, idle and without memory."""
        ours, theirs = socket.socketpair()
        path = f"{PACKAGE_ROOT}:{environment['PYTHONPATH']}" if environment.get("PYTHONPATH") else str(PACKAGE_ROOT)
        command = [sys.executable, "-S", "-m", "router.lab.emulator.runner", "runner", "--model", str(blob)]
        command += ["--port", str(port), "--fd", str(theirs.fileno()), "--rig", str(rig_dir or "")]
        with theirs:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**environment, "PYTHONPATH": path},
            )
        _, runner = await asyncio.get_running_loop().create_unix_connection(cls, sock=ours)
        runner.pid = child.pid
        runner._child = child
        return runner

    @property
    def is_alive(self) -> bool:
        return not self.gone.done()

    async def load(
        self, bytes_by_gpu: Mapping[str, int], seconds: float, pace: Mapping[str, float | int]
    ) -> str | None:
        """Loads; None once that is done, else why it failed. May be tried again."""
        self._loading = asyncio.get_running_loop().create_future()
        if not self.is_alive:
            return _DIED
        self._send({"op": "load", "bytes": dict(bytes_by_gpu), "seconds": seconds, "pace": dict(pace)})
        return await self._loading

    def behave(self, slow: float, hang: bool, die: bool) -> None:
        self._send({"op": "behave", "slow": slow, "hang": hang, "die": die})

    def run(self, prompt_tokens: int, tokens: int) -> Sequence:
        """Evaluates a prompt of at least one token and says so many tokens after it.

        Raises:
            RunnerLostError: the runner is dead.
        """
        if not self.is_alive:
            raise RunnerLostError
        self._next_id += 1
        self._sequences[self._next_id] = sequence = Sequence(self._next_id, self)
        self._send({"op": "run", "id": self._next_id, "prompt_tokens": max(1, prompt_tokens), "tokens": tokens})
        return sequence

    def cancel(self, key: int) -> None:
        self._send({"op": "cancel", "id": key})

    async def answers(self, deadline_seconds: float) -> bool:
        """Whether it is alive and says so within the time."""
        if not self.is_alive:
            return False
        if self._pong is None or self._pong.done():
            self._pong = asyncio.get_running_loop().create_future()
        self._send({"op": "ping"})
        done, _ = await asyncio.wait({self._pong, self.gone}, timeout=deadline_seconds,
                                     return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        return self.is_alive and bool(done)

    def kill(self) -> None:
        """SIGKILL, as real servers end their runners."""
        if self._child is not None and self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGKILL)

    # --- protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol names it)
        if self._loading is not None and not self._loading.done():
            self._loading.set_result(_DIED)
        if not self.gone.done():
            self.gone.set_result(None)
        for sequence in self._sequences.values():
            sequence.end()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["ev"]
        if kind == "step":
            for key in event["said"]:
                self._sequences[key].add()
            for key in event["over"]:
                self._sequences.pop(key).end()
        elif kind == "pong":
            if self._pong is not None and not self._pong.done():
                self._pong.set_result(None)
        elif self._loading is not None and not self._loading.done():
            self._loading.set_result(None if kind == "loaded" else str(event["message"]))

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps(message).encode() + b"\n")
