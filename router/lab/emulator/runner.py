"""An EMULATED runner: the child process that holds a model's GPU memory and paces its tokens.

The emulated server starts one per loaded model as `… runner --model BLOB --port N --fd N`. It allocates the memory,
waits as long as a load takes, then evaluates prompts and emits tokens in batches: up to 512 tokens of each waiting
prompt and one token of each running stream per step. When killed it frees its memory; when stopped it hangs; when its
server is killed it stays idle and keeps its memory, as real runners do. It knows no HTTP, plans nothing and generates
no text: the server does. It uses only the standard library, because it must start fast.

Messages are JSON lines on the inherited socket. In: `load`, `run`, `cancel`, `ping`, `behave`. Out: `loaded`, `oom`,
`step` (which sequences have one more token and which have ended), `pong`. A cancelled sequence ends with the current
batch, or, if its prompt is still being evaluated, at the end of the prompt.
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
    """Prompt tokens still to evaluate."""
    tokens: int
    """Tokens still to generate."""
    sent: int = 0
    is_cancelled: bool = False


@dataclass(slots=True)
class Behaviour:
    """Injected faults, from the faults file."""

    slow: float = 1.0
    hang: bool = False
    die: bool = False


@dataclass(slots=True)
class TokenRate:
    """Speed of the loaded model in real seconds; see `router.lab.simulator.world.Speed`."""

    step_seconds: float = 0.01
    stream_share: float = 0.08
    prefill_seconds_per_token: float = 0.0
    batch_tokens: int = 512
    work_share: float = 0.0
    """Share of each step that keeps a CPU core busy."""


@dataclass(slots=True)
class Runner:
    """State of the runner process."""

    link: socket.socket
    directory: Path | None
    token_rate: TokenRate = field(default_factory=TokenRate)
    behaviour: Behaviour = field(default_factory=Behaviour)
    sequences: dict[int, Sequence] = field(default_factory=dict[int, Sequence])
    receive_buffer: bytes = b""
    marked_at: float = 0.0
    is_on_gpus: bool = False

    def serve(self) -> None:
        """Runs until killed."""
        while True:
            step_seconds = self._step_seconds()
            if step_seconds is None:
                self._receive(None)
            else:
                self._compute(step_seconds)

    # --- messages ---

    def send(self, **message: Any) -> None:
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._idle_forever()

    def _receive(self, timeout_seconds: float | None) -> None:
        """Handles messages that arrive within the timeout; without one, blocks until something arrives."""
        ready, _, _ = select.select([self.link], [], [], timeout_seconds)
        if not ready:
            return
        data = self.link.recv(1 << 16)
        if not data:
            self._idle_forever()
        *lines, self.receive_buffer = (self.receive_buffer + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        operation = message.pop("op")
        if operation == "run":
            sequence = Sequence(**message)
            self.sequences[sequence.id] = sequence
        elif operation == "cancel":
            if message["id"] in self.sequences:
                self.sequences[message["id"]].is_cancelled = True
        elif operation == "ping":
            self.send(ev="pong")
        elif operation == "behave":
            self.behaviour = Behaviour(**message)
        elif operation == "load":
            self._load(message)

    def _load(self, message: dict[str, Any]) -> None:
        self.token_rate = TokenRate(**message["pace"])
        self.is_on_gpus = bool(message["bytes"])
        if self.directory is not None and self.is_on_gpus:
            try:
                vram.allocate(self.directory, message["bytes"])
            except vram.OutOfMemoryError as error:
                self.send(ev="oom", message=str(error))
                return
        end = time.monotonic() + message["seconds"] * self.behaviour.slow
        while (remaining := end - time.monotonic()) > 0:
            self._mark_busy()
            self._receive(min(remaining, _BUSY_MARK_SECONDS))
        self.send(ev="loaded")

    def _idle_forever(self) -> None:
        """Idles forever with its memory after the server has exited."""
        self.sequences.clear()
        while True:
            signal.pause()

    # --- computing ---

    def _step_seconds(self) -> float | None:
        """Duration of the next batch; None if there is nothing to do."""
        if not self.sequences or self.behaviour.hang:
            return None
        prompts = sum(min(seq.prompt_tokens, self.token_rate.batch_tokens) for seq in self.sequences.values())
        streams = sum(seq.prompt_tokens == 0 for seq in self.sequences.values())
        seconds = prompts * self.token_rate.prefill_seconds_per_token
        if streams:
            seconds += self.token_rate.step_seconds * (1 + self.token_rate.stream_share * (streams - 1))
        return seconds * self.behaviour.slow

    def _compute(self, seconds: float) -> None:
        """Runs one batch: waits its duration, then advances every prompt, and every stream by one token."""
        batch = list(self.sequences.values())
        start = time.monotonic()
        self._mark_busy()
        _burn_cpu(start + seconds * self.token_rate.work_share)
        while (remaining := start + seconds - time.monotonic()) > 0:
            self._receive(remaining)
        self._receive(0)
        if self.behaviour.die and any(seq.sent > 2 for seq in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        advanced = [seq.id for seq in batch if self._advance(seq)]
        ended = [seq.id for seq in batch if seq.prompt_tokens == 0 and (seq.tokens == 0 or seq.is_cancelled)]
        for key in ended:
            del self.sequences[key]
        if advanced or ended:
            self.send(ev="step", advanced=advanced, ended=ended)

    def _advance(self, sequence: Sequence) -> bool:
        """Advances a sequence by one batch; True if that produced a token."""
        sequence.prompt_tokens -= min(sequence.prompt_tokens, self.token_rate.batch_tokens)
        if sequence.prompt_tokens > 0 or sequence.tokens == 0 or sequence.is_cancelled:
            return False
        sequence.tokens -= 1
        sequence.sent += 1
        return True

    def _mark_busy(self) -> None:
        now = time.monotonic()
        if self.directory is not None and self.is_on_gpus and now - self.marked_at > _BUSY_MARK_SECONDS:
            self.marked_at = now
            path = self.directory / "vram" / f"{os.getpid()}.busy"
            path.write_text(str(now), encoding="utf-8")


def _burn_cpu(until: float) -> None:
    """Keeps a CPU core busy, as a model on the CPU does."""
    block = b"emulated" * 8192
    while time.monotonic() < until:
        hashlib.sha256(block).digest()


def main(arguments: list[str]) -> None:
    """Entry point of the process; does not return."""
    parser = argparse.ArgumentParser(prog="runner")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--rig", default="")
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    Runner(socket.socket(fileno=parsed.fd), Path(parsed.rig) if parsed.rig else None).serve()


if __name__ == "__main__":
    main(sys.argv[2:])
