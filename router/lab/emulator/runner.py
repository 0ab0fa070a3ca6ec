"""An EMULATED runner: the child process that holds a model's memory on the GPUs and says its words.

Started by the emulated server as `… runner --model BLOB --port N --fd N`, one for each loaded model. It takes the
memory, waits as long as a load takes, then evaluates prompts and emits tokens batch by batch: up to 512 tokens of each
waiting prompt and one token of each running stream in one step. Killed, it frees its memory; stopped, it hangs; when
its server is killed it stays, idle, with its memory, as real ones do. It knows no HTTP, plans nothing and makes up no
word: the server knows which come. The standard library only, because it must start fast.

Messages are lines of JSON on the inherited socket. In: `load`, `run`, `cancel`, `ping`, `behave`. Out: `loaded`, `oom`,
`step` (which sequences have one token more, and which have ended), `pong`. A cancelled sequence ends with the batch
under way; one whose prompt is still being evaluated, with its prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.lab.emulator import vram

_BUSY_MARK_SECONDS = 0.25


@dataclass(slots=True)
class Sequence:
    """One request in the batch."""

    id: int
    prompt_tokens: int
    """Still to be evaluated."""
    tokens: int
    """Still to be said."""
    sent: int = 0
    is_cancelled: bool = False


@dataclass(slots=True)
class Behaviour:
    """What the faults file asks for."""

    slow: float = 1.0
    hang: bool = False
    die: bool = False


@dataclass(slots=True)
class TokenRate:
    """The loaded model's speed in real seconds; see `router.sim.world.Speed`."""

    step_seconds: float = 0.01
    stream_share: float = 0.08
    prefill_seconds_per_token: float = 0.0
    batch_tokens: int = 512
    work_share: float = 0.0
    """Share of each step that is spent computing for real."""


@dataclass(slots=True)
class Runner:
    """State of the process."""

    link: socket.socket
    directory: Path | None
    pace: TokenRate = field(default_factory=TokenRate)
    behaviour: Behaviour = field(default_factory=Behaviour)
    sequences: dict[int, Sequence] = field(default_factory=dict[int, Sequence])
    unread: bytes = b""
    marked_at: float = 0.0
    is_on_gpus: bool = False

    def serve(self) -> None:
        """Until killed."""
        while True:
            step = self._step_seconds()
            if step is None:
                self._receive(None)
            else:
                self._compute(step)

    # --- messages ---

    def send(self, **message: Any) -> None:
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._orphaned()

    def _receive(self, timeout_seconds: float | None) -> None:
        """Handles what comes within the time, at least one reading where there is no limit."""
        ready, _, _ = select.select([self.link], [], [], timeout_seconds)
        if not ready:
            return
        data = self.link.recv(1 << 16)
        if not data:
            self._orphaned()
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message.pop("op")
        if kind == "run":
            sequence = Sequence(**message)
            self.sequences[sequence.id] = sequence
        elif kind == "cancel":
            if message["id"] in self.sequences:
                self.sequences[message["id"]].is_cancelled = True
        elif kind == "ping":
            self.send(ev="pong")
        elif kind == "behave":
            self.behaviour = Behaviour(**message)
        elif kind == "load":
            self._load(message)

    def _load(self, message: dict[str, Any]) -> None:
        self.pace = TokenRate(**message["pace"])
        self.is_on_gpus = bool(message["bytes"])
        if self.directory is not None and self.is_on_gpus:
            try:
                vram.allocate(self.directory, message["bytes"])
            except vram.OutOfMemoryError as error:
                self.send(ev="oom", message=str(error))
                return
        end = time.monotonic() + message["seconds"] * self.behaviour.slow
        while (left := end - time.monotonic()) > 0:
            self._mark_busy()
            self._receive(min(left, _BUSY_MARK_SECONDS))
        self.send(ev="loaded")

    def _orphaned(self) -> None:
        """The server is gone: nothing to do any more, and nothing to stop for."""
        self.sequences.clear()
        while True:
            signal.pause()

    # --- computing ---

    def _step_seconds(self) -> float | None:
        """How long the next batch takes; None with nothing to do."""
        if not self.sequences or self.behaviour.hang:
            return None
        prompts = sum(min(one.prompt_tokens, self.pace.batch_tokens) for one in self.sequences.values())
        streams = sum(one.prompt_tokens == 0 for one in self.sequences.values())
        seconds = prompts * self.pace.prefill_seconds_per_token
        if streams:
            seconds += self.pace.step_seconds * (1 + self.pace.stream_share * (streams - 1))
        return seconds * self.behaviour.slow

    def _compute(self, seconds: float) -> None:
        """One batch: waits its time, then each waiting prompt is further on and each stream has one word more."""
        batch = list(self.sequences.values())
        start = time.monotonic()
        self._mark_busy()
        _work(start + seconds * self.pace.work_share)
        while (left := start + seconds - time.monotonic()) > 0:
            self._receive(left)
        self._receive(0)
        if self.behaviour.die and any(one.sent > 2 for one in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        said = [one.id for one in batch if self._advance(one)]
        over = [one.id for one in batch if one.prompt_tokens == 0 and (one.tokens == 0 or one.is_cancelled)]
        for key in over:
            del self.sequences[key]
        if said or over:
            self.send(ev="step", said=said, over=over)

    def _advance(self, one: Sequence) -> bool:
        """One batch further; whether that gave a token."""
        one.prompt_tokens -= min(one.prompt_tokens, self.pace.batch_tokens)
        if one.prompt_tokens > 0 or one.tokens == 0 or one.is_cancelled:
            return False
        one.tokens -= 1
        one.sent += 1
        return True

    def _mark_busy(self) -> None:
        now = time.monotonic()
        if self.directory is not None and self.is_on_gpus and now - self.marked_at > _BUSY_MARK_SECONDS:
            self.marked_at = now
            path = self.directory / "vram" / f"{os.getpid()}.busy"
            path.write_text(str(now), encoding="utf-8")


def _work(until: float) -> None:
    """Keeps a core busy, as a model on the CPU does."""
    block = b"emulated" * 8192
    while time.monotonic() < until:
        hashlib.sha256(block).digest()


def main(arguments: list[str]) -> None:
    """Entry of the process; does not return."""
    parser = argparse.ArgumentParser(prog="runner")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--rig", default="")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    Runner(socket.socket(fileno=given.fd), Path(given.rig) if given.rig else None).serve()


if __name__ == "__main__":
    main(sys.argv[2:])
