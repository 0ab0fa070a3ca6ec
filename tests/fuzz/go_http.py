"""Go's net/http as a judge: a small program, compiled once, that says which requests it reads from a connection."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "oracle" / "main.go"


@dataclass(frozen=True, slots=True)
class SeenRequest:
    method: str
    target: str
    host: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """`requests`: those that came whole. `statuses`: of all answers, refusals by the HTTP library included."""

    requests: list[SeenRequest]
    statuses: list[int]


class GoHttp:
    """One running process; a context manager."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> GoHttp:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=10)

    def read(self, raw: bytes) -> Seen:
        """What a server reads from a connection on which these bytes come, and then the end."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(struct.pack(">I", len(raw)) + raw)
        stdin.flush()
        found = json.loads(stdout.readline())
        requests = [
            SeenRequest(one["method"], one["target"], one["host"], base64.b64decode(one["body"] or ""))
            for one in found["requests"]
        ]
        return Seen(requests, found["statuses"])
