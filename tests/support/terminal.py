"""A command of the router in a pseudo-terminal, as a user sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator, Mapping, Sequence

from tests.support.ollama_server import ROOT

_DEADLINE_SECONDS = 60.0


class Terminal:
    """A running command; `output` is all that it has written."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.output = ""
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, text: str, after: int = 0) -> str:
        """Reads until `text` comes, beginning at the character `after` of the output; returns the output."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while text not in self.output[after:]:
            assert time.monotonic() < deadline and self._read(), f"{text!r} did not come:\n{self.output[-3000:]}"
        return self.output

    def end(self) -> int:
        """Reads the rest; the exit code."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while time.monotonic() < deadline and self._read():
            continue
        return self.process.wait(_DEADLINE_SECONDS)

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], _DEADLINE_SECONDS)[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the other end is closed
            return False
        self.output += data.decode("utf-8", "replace")
        return bool(data)


@contextlib.contextmanager
def in_terminal(
    arguments: Sequence[str], environment: Mapping[str, str], columns: int = 100, rows: int = 30
) -> Generator[Terminal]:
    """Runs `llamayard ARGUMENTS` in a terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "router", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env={"TERM": "xterm", **environment}, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(_DEADLINE_SECONDS)
        os.close(ours)
