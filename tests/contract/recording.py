"""Reads the recorded exchanges into one form. It judges nothing; `tests.contract.shape` compares."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.rawhttp import End, Head, Reply, request_bytes

FOLDER = Path(__file__).parent / "recordings"


@dataclass(frozen=True, slots=True)
class Recording:
    """One exchange with a real 0.24.0: the request's bytes and the whole answer."""

    name: str
    """Folder and file: `0.24.0/chat-stream`."""
    request: bytes
    reply: Reply


def recordings() -> list[Recording]:
    """All of both sets, in the order of their names."""
    first = [_of_first_set(path) for path in sorted((FOLDER / "first").glob("*.json"))]
    return first + [_of_second_set(path) for path in sorted((FOLDER / "0.24.0").glob("*.json"))]


def _of_first_set(path: Path) -> Recording:
    data = json.loads(path.read_text("utf-8"))
    asked = data["request"]
    request = request_bytes(asked["method"], asked["path"], asked["body"].encode() or None)
    top, _, body = data["response"].partition("\r\n\r\n")
    head = _head(top.split("\r\n")[0], [tuple(line.split(": ", 1)) for line in top.split("\r\n")[1:]])
    chunks = _split_chunks(body.encode()) if head.header("Transfer-Encoding") else ([body.encode()] if body else [])
    return Recording(f"first/{path.stem}", request, Reply(head, tuple(chunks), "complete"))


def _of_second_set(path: Path) -> Recording:
    data = json.loads(path.read_text("utf-8"))
    answer = data["response"]
    head = _head(answer["status_line"], [tuple(pair) for pair in answer["headers"]])
    texts = [text for ms, text in answer.get("chunks_ms_text", []) if ms is not None]
    texts += [answer["body"]] if answer.get("body") else []
    end: End = "eof" if answer["end"] == "eof" else "complete"
    return Recording(
        f"0.24.0/{path.stem}", data["request_raw"].encode(), Reply(head, tuple(map(str.encode, texts)), end)
    )


def _head(line: str, headers: list[Any]) -> Head:
    match = re.fullmatch(r"HTTP/1\.1 (\d{3}) ?(.*)", line)
    assert match is not None, line
    return Head(int(match[1]), match[2], tuple(headers))


def _split_chunks(body: bytes) -> list[bytes]:
    """By line ends, not by size: no chunk holds a carriage return, and texts with a host's name were shortened."""
    return [chunk for chunk in body.split(b"\r\n")[1::2] if chunk]
