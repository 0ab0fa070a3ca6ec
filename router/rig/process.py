"""One runner child of the emulated server, seen from the server: started, loaded, run, killed.

The child is `router.rig.runner`; they talk in lines of JSON over a socket pair. The end of that socket is the end of
the child. It schedules nothing and knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]

Event = dict[str, Any]


class RunnerLostError(Exception):
    """The runner is gone."""


class RunnerProcess(asyncio.Protocol):
    """A live runner. Made by `start`; everything else may be called until `lost`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[str | None] = loop.create_future()
        """None once loaded, else why not."""
        self.gone: asyncio.Future[None] = loop.create_future()
        self.pid = 0
        self._transport: asyncio.Transport | None = None
        self._queues: dict[int, asyncio.Queue[Event | None]] = {}
        self._pong: asyncio.Future[None] | None = None
        self._unread = b""
        self._next_id = 0
        self._child: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(cls, blob: Path, port: int, rig_dir: Path | None, environment: Mapping[str, str]) -> RunnerProcess:
        """A new child in the server's own process group, idle and without memory."""
        ours, theirs = socket.socketpair()
        path = f"{PACKAGE_ROOT}:{environment['PYTHONPATH']}" if environment.get("PYTHONPATH") else str(PACKAGE_ROOT)
        command = [sys.executable, "-S", "-m", "router.rig.runner", "runner", "--model", str(blob)]
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

    def load(self, bytes_by_card: Mapping[str, int], seconds: float, pace: Mapping[str, float | int]) -> None:
        """Begins the load; `loaded` tells how it ended."""
        self._send({"op": "load", "bytes": dict(bytes_by_card), "seconds": seconds, "pace": dict(pace)})

    def behave(self, slow: float, hang: bool, die: bool) -> None:
        self._send({"op": "behave", "slow": slow, "hang": hang, "die": die})

    async def run(self, prompt_tokens: int, words: list[str], ends_with: str) -> AsyncGenerator[Event]:
        """Events `token` and at last `done`. Closing it ends the sequence in the runner.

        Raises:
            RunnerLostError: the runner died.
        """
        if not self.is_alive:
            raise RunnerLostError
        self._next_id += 1
        key, queue = self._next_id, asyncio.Queue[Event | None]()
        self._queues[key] = queue
        message = {"op": "run", "id": key, "prompt_tokens": prompt_tokens, "words": words, "ends_with": ends_with}
        self._send(message)
        try:
            while True:
                event = await queue.get()
                if event is None:
                    raise RunnerLostError
                yield event
                if event["ev"] == "done":
                    return
        finally:
            self._queues.pop(key, None)
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
        if not self.loaded.done():
            self.loaded.set_result("the runner died")
        if not self.gone.done():
            self.gone.set_result(None)
        for queue in self._queues.values():
            queue.put_nowait(None)

    def _take(self, event: Event) -> None:
        kind = event["ev"]
        if kind in ("token", "done"):
            if event["id"] in self._queues:
                self._queues[event["id"]].put_nowait(event)
        elif kind == "pong":
            if self._pong is not None and not self._pong.done():
                self._pong.set_result(None)
        elif not self.loaded.done():
            self.loaded.set_result(None if kind == "loaded" else str(event["message"]))

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps(message).encode() + b"\n")
