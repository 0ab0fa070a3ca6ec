"""Reads the recorded exchanges; `tests.contract.shape` compares them."""

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
    """One exchange with a real 0.24.0: the raw request and the whole response."""

    name: str
    """Folder and file name: `0.24.0/chat-stream`."""
    request: bytes
    reply: Reply


def recordings() -> list[Recording]:
    """All recordings of both sets, sorted by name."""
    first = [_from_first_set(path) for path in sorted((FOLDER / "first").glob("*.json"))]
    return first + [_from_second_set(path) for path in sorted((FOLDER / "0.24.0").glob("*.json"))]


def _from_first_set(path: Path) -> Recording:
    data = json.loads(path.read_text("utf-8"))
    recorded_request = data["request"]
    request = request_bytes(
        recorded_request["method"], recorded_request["path"], recorded_request["body"].encode() or None
    )
    head_text, _, body = data["response"].partition("\r\n\r\n")
    head = _head(head_text.split("\r\n")[0], [tuple(line.split(": ", 1)) for line in head_text.split("\r\n")[1:]])
    chunks = _split_chunks(body.encode()) if head.header("Transfer-Encoding") else ([body.encode()] if body else [])
    return Recording(f"first/{path.stem}", request, Reply(head, tuple(chunks), "complete"))


def _from_second_set(path: Path) -> Recording:
    data = json.loads(path.read_text("utf-8"))
    recorded_response = data["response"]
    head = _head(recorded_response["status_line"], [tuple(pair) for pair in recorded_response["headers"]])
    texts = [text for ms, text in recorded_response.get("chunks_ms_text", []) if ms is not None]
    texts += [recorded_response["body"]] if recorded_response.get("body") else []
    end: End = "eof" if recorded_response["end"] == "eof" else "complete"
    return Recording(
        f"0.24.0/{path.stem}", data["request_raw"].encode(), Reply(head, tuple(map(str.encode, texts)), end)
    )


def _head(line: str, headers: list[Any]) -> Head:
    match = re.fullmatch(r"HTTP/1\.1 (\d{3}) ?(.*)", line)
    assert match is not None, line
    return Head(int(match[1]), match[2], tuple(headers))


def _split_chunks(body: bytes) -> list[bytes]:
    """Splits at line ends, not by size: no chunk has a carriage return, and texts with a host name were shortened."""
    return [chunk for chunk in body.split(b"\r\n")[1::2] if chunk]
