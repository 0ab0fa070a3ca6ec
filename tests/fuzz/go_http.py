"""Go's net/http as a judge: a small program, compiled once, that says which requests it reads from a connection."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.support.go_judge import GoJudge

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


class GoHttp(GoJudge):
    def read(self, raw: bytes) -> Seen:
        """What a server reads from a connection on which these bytes come, and then the end."""
        found = self.ask(struct.pack(">I", len(raw)) + raw)
        requests = [
            SeenRequest(one["method"], one["target"], one["host"], base64.b64decode(one["body"] or ""))
            for one in found["requests"]
        ]
        return Seen(requests, found["statuses"])
