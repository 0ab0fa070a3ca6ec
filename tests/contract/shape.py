"""What of an answer must be equal between two servers: everything but ids, times, numbers of tokens and made-up words.

`shape` turns an answer into plain values that can be compared with `==`. Streams keep the borders of their HTTP chunks;
runs of equal chunks count as one, so that the number of words does not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from tests.support.rawhttp import Reply

HEADERS = (
    "Content-Type",
    "Transfer-Encoding",
    "Cache-Control",
    "Connection",
    "Location",
    "Allow",
    "Vary",
    "Access-Control-Allow-Origin",
    "Access-Control-Allow-Methods",
    "Access-Control-Allow-Headers",
    "Access-Control-Max-Age",
)
"""Headers that clients act on; `Date` and the value of `Content-Length` are not among them."""

_TIMES = frozenset({"created_at", "modified_at", "expires_at", "completed_at", "created"})
_COUNTS = frozenset({"prompt_eval_count", "eval_count", "sequence_number", "size", "size_vram", "context_length"})
_USAGE = frozenset({"prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"})
_DURATIONS = frozenset({"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"})
_IDS = frozenset({"id", "digest", "item_id", "request_id", "version", "owned_by"})
_WORDS = frozenset({"response", "content", "thinking", "reasoning", "text", "delta", "token", "logprob", "embedding"})
_FILE = frozenset({"modelfile", "parent_model", "parameter_size", "general.parameter_count"})
_VARYING = _TIMES | _COUNTS | _USAGE | _DURATIONS | _IDS | _WORDS | _FILE
"""Keys whose value belongs to the run; a text keeps only whether it is empty."""

_COLLECTIONS = frozenset({"models", "data", "tensors", "logprobs", "top_logprobs"})
"""Lists whose members are compared as a set of shapes: how many there are belongs to the run."""

_NAMES_IN_COLLECTIONS = frozenset({"name", "model", "family", "families", "parameters", "shape", "type", "index"})

_TEXT = (
    (re.compile(r"\b(sha256[:-])?[0-9a-f]{64}\b"), "<digest>"),
    (re.compile(r"\d+\.\d+ [KMG]iB"), "<size>"),
    (re.compile(r"(dial tcp: lookup ).*"), r"\1<resolver>"),
    (re.compile(r'(?<=[\s"])\S*(?=/(blobs|manifests)/)'), "<models>"),
    (re.compile(r"\breq_\w+"), "<request>"),
)


def shape(reply: Reply) -> dict[str, Any]:
    """Status, headers that matter, the body's shape and how the connection ended."""
    headers = {name: value for name in HEADERS if (value := reply.header(name)) is not None}
    return {"status": reply.status, "headers": headers, "body": _body(reply), "end": reply.end}


def _body(reply: Reply) -> Any:
    kind = (reply.header("Content-Type") or "").partition(";")[0]
    if kind == "application/json" and reply.body:
        return {"json": _value("", json.loads(reply.body)), "newline at its end": reply.body.endswith(b"\n")}
    if kind in ("application/x-ndjson", "text/event-stream"):
        return _without_runs([tuple(map(_line, chunk.decode().splitlines())) for chunk in reply.chunks])
    return reply.body.decode()


def _line(line: str) -> Any:
    prefix, text = ("data: ", line[6:]) if line.startswith("data: ") else ("", line)
    return (prefix, _value("", json.loads(text))) if text.startswith("{") else prefix + text


def _without_runs(values: Sequence[Any]) -> list[Any]:
    return [key for key, _ in groupby(values)]


def _value(key: str, value: Any, listed: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _value(name, inner, listed) for name, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return _members(key, cast("list[Any]", value), listed or key in _COLLECTIONS)
    if key in _VARYING or (listed and key in _NAMES_IN_COLLECTIONS):
        return _placeholder(value)
    return _text(value) if isinstance(value, str) else value


def _members(key: str, values: list[Any], listed: bool) -> Any:
    if values and all(isinstance(value, int | float) for value in values):
        return "<numbers>"
    if (listed or len(values) > 32) and values and all(isinstance(value, str) for value in values):
        return "<texts>"
    shapes = [_value(key, value, listed) for value in values]
    return _distinct(shapes) if key in _COLLECTIONS else _without_runs(shapes)


def _distinct(shapes: Sequence[Any]) -> list[Any]:
    ordered = {json.dumps(one, sort_keys=True): one for one in shapes}
    return [ordered[key] for key in sorted(ordered)]


def _placeholder(value: Any) -> Any:
    if isinstance(value, str):
        return "<text>" if value else ""
    return "<number>" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _text(value: str) -> str:
    for pattern, replacement in _TEXT:
        value = pattern.sub(replacement, value)
    return value


def differences(got: Any, wanted: Any, where: str = "") -> list[str]:
    """One line for each place where two shapes differ; none where they are equal."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        return _key_differences(cast("dict[str, Any]", got), cast("dict[str, Any]", wanted), where)
    if isinstance(got, list | tuple) and isinstance(wanted, list | tuple):
        left, right = cast("list[Any]", got), cast("list[Any]", wanted)
        if len(left) == len(right):
            pairs = enumerate(zip(left, right, strict=True))
            return [line for index, (one, other) in pairs for line in differences(one, other, f"{where}[{index}]")]
    return [] if got == wanted else [f"{where}: {got!r} instead of {wanted!r}"]


def _key_differences(got: dict[str, Any], wanted: dict[str, Any], where: str) -> list[str]:
    missing = [f"{where}.{key}: missing" for key in wanted if key not in got]
    further = [f"{where}.{key}: not there in the recording" for key in got if key not in wanted]
    shared = [key for key in wanted if key in got]
    inner = [line for key in shared for line in differences(got[key], wanted[key], f"{where}.{key}")]
    return missing + further + inner
