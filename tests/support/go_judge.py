"""A compiled Go program that is asked by its standard input, and answers each question with a line of JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Self


class GoJudge:
    """One running process; a context manager."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=10)

    def ask(self, question: bytes) -> Any:
        """The answer, decoded."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(question)
        stdin.flush()
        return json.loads(stdout.readline())
