"""Go's encoding/json as a judge: a small program, compiled once, that says what a body decodes to."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent / "oracle" / "main.go"
COMPILE_SECONDS = 300


class GoOracle:
    """One running process; a context manager."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> GoOracle:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=10)

    def decode(self, path: str, body: bytes) -> dict[str, Any]:
        """`ok`, `error` and what the server's struct then holds."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(struct.pack(">II", len(path), len(body)) + path.encode() + body)
        stdin.flush()
        return json.loads(stdout.readline())


def compile_oracle(folder: Path, source: Path = SOURCE) -> Path:
    """The compiled program in `folder`; skips where there is no Go, but not in CI."""
    go = shutil.which("go")
    if go is None:
        reason = f"needs Go to compile a judge ({source.parent.relative_to(Path(__file__).parents[2])})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    binary = folder / "oracle"
    subprocess.run([go, "build", "-o", binary, source], check=True, timeout=COMPILE_SECONDS, capture_output=True)
    return binary
