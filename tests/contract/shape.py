"""The comparable part of a response: everything but ids, times, token counts and generated text.

`shape` converts a response to plain values that can be compared with `==`. Streams keep their HTTP chunk boundaries;
runs of equal chunks count as one, so that the number of tokens does not matter.
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
"""Headers that clients act on; without `Date` and the value of `Content-Length`."""

_TIMES = frozenset({"created_at", "modified_at", "expires_at", "completed_at", "created"})
_COUNTS = frozenset({"prompt_eval_count", "eval_count", "sequence_number", "size", "size_vram", "context_length",
                     "prompt_eval_cached_count", "embedding_length"})  # fmt: skip
_USAGE = frozenset({"prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens",
                    "cached_tokens", "cache_read_input_tokens"})  # fmt: skip
_DURATIONS = frozenset({"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"})
_IDS = frozenset({"id", "digest", "item_id", "request_id", "version", "owned_by"})
_GENERATED = frozenset(
    {"response", "content", "thinking", "reasoning", "text", "delta", "token", "logprob", "embedding"}
)
_FILE = frozenset({"modelfile", "parent_model", "parameter_size", "general.parameter_count"})
_VARYING = _TIMES | _COUNTS | _USAGE | _DURATIONS | _IDS | _GENERATED | _FILE
"""Keys whose values vary between runs; for strings only emptiness is compared."""

_COLLECTIONS = frozenset({"models", "data", "tensors", "logprobs", "top_logprobs"})
"""Lists whose items are compared as a set of shapes, because their number varies between runs."""

_NAMES_IN_COLLECTIONS = frozenset({"name", "model", "family", "families", "parameters", "shape", "type", "index"})

_TEXT = (
    (re.compile(r"\b(sha256[:-])?[0-9a-f]{64}\b"), "<digest>"),
    (re.compile(r"\d+\.\d+ [KMG]iB|(?<=allocate )\d+\.\d+ MB|(?<=of size )\d+"), "<size>"),
    (re.compile(r"(dial tcp: lookup ).*"), r"\1<resolver>"),
    (re.compile(r'(?<=[\s"])\S*(?=/(blobs|manifests)/)'), "<models>"),
    (re.compile(r"\breq_\w+"), "<request>"),
)


def shape(reply: Reply) -> dict[str, Any]:
    """Status, relevant headers, the body's shape and how the connection ended."""
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


def _value(key: str, value: Any, in_collection: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _value(name, inner, in_collection) for name, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return _items(key, cast("list[Any]", value), in_collection or key in _COLLECTIONS)
    if key in _VARYING or (in_collection and key in _NAMES_IN_COLLECTIONS):
        return _placeholder(value)
    return _text(value) if isinstance(value, str) else value


def _items(key: str, values: list[Any], in_collection: bool) -> Any:
    if values and all(isinstance(value, int | float) for value in values):
        return "<numbers>"
    if (in_collection or len(values) > 32) and values and all(isinstance(value, str) for value in values):
        return "<texts>"
    shapes = [_value(key, value, in_collection) for value in values]
    return _distinct(shapes) if key in _COLLECTIONS else _without_runs(shapes)


def _distinct(shapes: Sequence[Any]) -> list[Any]:
    ordered = {json.dumps(item, sort_keys=True): item for item in shapes}
    return [ordered[key] for key in sorted(ordered)]


def _placeholder(value: Any) -> Any:
    if isinstance(value, str):
        return "<text>" if value else ""
    return "<number>" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _text(value: str) -> str:
    for pattern, replacement in _TEXT:
        value = pattern.sub(replacement, value)
    return value


def differences(actual: Any, expected: Any, path: str = "") -> list[str]:
    """One line for each difference between two shapes; empty if they are equal."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        return _key_differences(cast("dict[str, Any]", actual), cast("dict[str, Any]", expected), path)
    if isinstance(actual, list | tuple) and isinstance(expected, list | tuple):
        actual_items, expected_items = cast("list[Any]", actual), cast("list[Any]", expected)
        if len(actual_items) == len(expected_items):
            pairs = enumerate(zip(actual_items, expected_items, strict=True))
            return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}[{index}]")]
    return [] if actual == expected else [f"{path}: {actual!r} instead of {expected!r}"]


def _key_differences(actual: dict[str, Any], expected: dict[str, Any], path: str) -> list[str]:
    missing = [f"{path}.{key}: missing" for key in expected if key not in actual]
    unexpected = [f"{path}.{key}: not there in the recording" for key in actual if key not in expected]
    shared = [key for key in expected if key in actual]
    inner = [line for key in shared for line in differences(actual[key], expected[key], f"{path}.{key}")]
    return missing + unexpected + inner
