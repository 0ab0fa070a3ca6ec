"""Reads the recorded exchanges; `tests.contract.shape` compares them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.rawhttp import End, Head, Reply, request_bytes

FOLDER = Path(__file__).parent / "recordings"


@dataclass(frozen=True, slots=True)
class Recording:
    """One exchange with a real server: the raw request and the whole response."""

    name: str
    """Folder, which is the server's version or `first`, and file name: `0.34.0/chat-stream`."""
    request: bytes
    reply: Reply

    @property
    def title(self) -> str:
        """The name without the version: `chat-stream`, or `first-chat-stream` from the first set."""
        folder, _, stem = self.name.rpartition("/")
        return f"first-{stem}" if folder == "first" else stem

    @property
    def exchange(self) -> str:
        """What is asked: the title without its set."""
        return self.title.removeprefix("first-")


def recordings(version: str = "0.24.0") -> list[Recording]:
    """All recordings of a server's version, sorted by name; two sets for 0.24.0."""
    first = [_from_first_set(path) for path in sorted((FOLDER / "first").glob("*.json"))] if version == "0.24.0" else []
    return first + [_from_file(path) for path in sorted((FOLDER / version).glob("*.json"))]


@functools.cache
def recordings_by_title(server_version: str) -> Mapping[str, Recording]:
    """What a server of this version is compared with, by title. Both versions have the same titles."""
    is_0_30 = tuple(int(part) for part in server_version.split(".")) >= (0, 30)
    return {recording.title: recording for recording in recordings("0.34.0" if is_0_30 else "0.24.0")}


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


def _from_file(path: Path) -> Recording:
    data = json.loads(path.read_text("utf-8"))
    recorded_response = data["response"]
    head = _head(recorded_response["status_line"], [tuple(pair) for pair in recorded_response["headers"]])
    texts = [text for ms, text in recorded_response.get("chunks_ms_text", []) if ms is not None]
    texts += recorded_response.get("chunks", [])
    texts += [recorded_response["body"]] if recorded_response.get("body") else []
    end: End = "eof" if recorded_response["end"] == "eof" else "complete"
    name = f"{path.parent.name}/{path.stem}"
    return Recording(name, data["request_raw"].encode(), Reply(head, tuple(map(str.encode, texts)), end))


def write_recording(folder: Path, recording: Recording, server: str) -> None:
    """Writes a recording to `folder`, in which `_from_file` finds the same."""
    head = recording.reply.head
    response: dict[str, Any] = {
        "status_line": f"HTTP/1.1 {head.status} {head.reason}".rstrip(),
        "headers": head.headers,
        "end": recording.reply.end,
    }
    if recording.reply.chunked:
        response["chunks"] = [chunk.decode() for chunk in recording.reply.chunks]
    else:
        response["body"] = recording.reply.body.decode()
    data = {"server": server, "request_raw": recording.request.decode(), "response": response}
    (folder / f"{recording.title}.json").write_text(
        json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _head(line: str, headers: list[Any]) -> Head:
    match = re.fullmatch(r"HTTP/1\.1 (\d{3}) ?(.*)", line)
    assert match is not None, line
    return Head(int(match[1]), match[2], tuple(headers))


def _split_chunks(body: bytes) -> list[bytes]:
    """Splits at line ends, not by size: no chunk has a carriage return, and texts with a host name were shortened."""
    return [chunk for chunk in body.split(b"\r\n")[1::2] if chunk]
