"""One runner process as the emulated server sees it: start, load, run, kill.

The process is `router.lab.emulator.runner`; messages are JSON lines over a socket pair. A closed socket means that the
process has exited. Schedules nothing and knows no HTTP.
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

_RUNNER_DIED = "the runner died"


class RunnerLostError(Exception):
    """The runner has exited."""


class Sequence:
    """One prompt in the runner's batch, and the tokens generated from it."""

    def __init__(self, key: int, process: RunnerProcess) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the runner has removed the sequence."""
        self._key = key
        self._process = process
        self._available_tokens = 0
        self._token_available = asyncio.Event()

    async def token(self) -> bool:
        """Waits for one token; returns False after the last.

        Raises:
            RunnerLostError: the runner died first.
        """
        while self._available_tokens == 0:
            if self.ended.done():
                if not self._process.is_alive:
                    raise RunnerLostError
                return False
            self._token_available.clear()
            await self._token_available.wait()
        self._available_tokens -= 1
        return True

    def cancel(self) -> None:
        """Stops generating tokens."""
        if not self.ended.done():
            self._process.cancel(self._key)

    def add_token(self) -> None:
        self._available_tokens += 1
        self._token_available.set()

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self._token_available.set()


class RunnerProcess(asyncio.Protocol):
    """A running runner process. Create it with `start`; methods may be called until `exited` is done."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.pid = 0
        self._transport: asyncio.Transport | None = None
        self._load_future: asyncio.Future[str | None] | None = None
        self._sequences: dict[int, Sequence] = {}
        self._pong: asyncio.Future[None] | None = None
        self._receive_buffer = b""
        self._next_id = 0
        self._child: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(
        cls, blob: Path, port: int, emulator_dir: Path | None, environment: Mapping[str, str]
    ) -> RunnerProcess:
        """Starts a process in the server's process group, idle and without memory."""
        local_socket, remote_socket = socket.socketpair()
        path = f"{PACKAGE_ROOT}:{environment['PYTHONPATH']}" if environment.get("PYTHONPATH") else str(PACKAGE_ROOT)
        command = [sys.executable, "-S", "-m", "router.lab.emulator.runner", "runner", "--model", str(blob)]
        command += ["--port", str(port), "--fd", str(remote_socket.fileno()), "--rig", str(emulator_dir or "")]
        with remote_socket:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(remote_socket.fileno(),),
                env={**environment, "PYTHONPATH": path},
            )
        _, runner = await asyncio.get_running_loop().create_unix_connection(cls, sock=local_socket)
        runner.pid = child.pid
        runner._child = child
        return runner

    @property
    def is_alive(self) -> bool:
        return not self.exited.done()

    async def load(
        self, bytes_by_gpu: Mapping[str, int], seconds: float, token_rate: Mapping[str, float | int]
    ) -> str | None:
        """Loads the model; returns None on success, else the error. May be retried."""
        self._load_future = asyncio.get_running_loop().create_future()
        if not self.is_alive:
            return _RUNNER_DIED
        self._send({"op": "load", "bytes": dict(bytes_by_gpu), "seconds": seconds, "pace": dict(token_rate)})
        return await self._load_future

    def behave(self, slow: float, hang: bool, die: bool) -> None:
        self._send({"op": "behave", "slow": slow, "hang": hang, "die": die})

    def run(self, prompt_tokens: int, tokens: int) -> Sequence:
        """Evaluates a prompt of at least one token and generates `tokens` tokens after it.

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

    async def responds(self, deadline_seconds: float) -> bool:
        """Whether the process is alive and answers a ping within the deadline."""
        if not self.is_alive:
            return False
        if self._pong is None or self._pong.done():
            self._pong = asyncio.get_running_loop().create_future()
        self._send({"op": "ping"})
        done, _ = await asyncio.wait({self._pong, self.exited}, timeout=deadline_seconds,
                                     return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        return self.is_alive and bool(done)

    def kill(self) -> None:
        """Sends SIGKILL, as real servers do."""
        if self._child is not None and self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGKILL)

    # --- protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._receive_buffer = (self._receive_buffer + data).split(b"\n")
        for line in lines:
            self._handle_event(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (required by the protocol)
        if self._load_future is not None and not self._load_future.done():
            self._load_future.set_result(_RUNNER_DIED)
        if not self.exited.done():
            self.exited.set_result(None)
        for sequence in self._sequences.values():
            sequence.end()

    def _handle_event(self, event: dict[str, Any]) -> None:
        kind = event["ev"]
        if kind == "step":
            for key in event["advanced"]:
                self._sequences[key].add_token()
            for key in event["ended"]:
                self._sequences.pop(key).end()
        elif kind == "pong":
            if self._pong is not None and not self._pong.done():
                self._pong.set_result(None)
        elif self._load_future is not None and not self._load_future.done():
            self._load_future.set_result(None if kind == "loaded" else str(event["message"]))

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps(message).encode() + b"\n")
