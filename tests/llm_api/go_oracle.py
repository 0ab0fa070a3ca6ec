"""Go's encoding/json as a judge: a small program, compiled once, that says what a body decodes to."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.go_judge import GoJudge

SOURCE = Path(__file__).parent / "oracle" / "main.go"
COMPILE_SECONDS = 300


class GoOracle(GoJudge):
    def decode(self, path: str, body: bytes) -> dict[str, Any]:
        """`ok`, `error` and what the server's struct then holds."""
        return self.ask(struct.pack(">II", len(path), len(body)) + path.encode() + body)


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
