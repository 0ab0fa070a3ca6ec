"""How a reply ended, judging by its last bytes: complete, with an error, truncated, or because its runner died.

A server hides most deaths: a stream whose runner is killed ends cleanly, with an error line on `/api`, with one event
that names no model on `/v1/chat/completions`, and without any sign on the other two. It also ends a stream without a
mark after 30 equal tokens in a row. Only the tail is inspected, so the cost per token is zero.

In JSON text quotes and line breaks are escaped, so no generated text can look like an end mark.

Sources: observed on 0.24.0 and 0.32.15 (`runner-killed-*` and `repeat-limit-*` in the recordings);
openai/responses.go (v0.24.0, v0.34.0), whose events have sorted keys, so that `type` is the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

TAIL_BYTES = 4096
"""Bytes kept of a reply's end. The last line of `/api/generate` may be longer, but its counts are at its end."""

RUNNER_DIED = (b"process no longer running", b"unexpected EOF", b"connection reset", b"connection refused",
               b"model runner has unexpectedly stopped")  # fmt: skip
"""A server's messages for a dead runner, before or within a reply."""

BAD_OPTION = re.compile(rb'option \\?"[a-z_]+\\?" must be of type')
"""An Ollama server's words for an option of the wrong type, which it answers with status 500: no failure of its own."""

_LAST_LINE = re.compile(rb'"done": ?true|"total_duration":')
"""The last line of NDJSON may be so long that only the counts after its `"done":true` are in the tail."""
_NOT_DONE = b'"done":false}'
_EVENT_BREAK = re.compile(rb"\r?\n\r?\n")
_OPENAI_END = re.compile(rb"^data: ?\[DONE\]$", re.MULTILINE)
_LAST_EVENTS: Mapping[str, re.Pattern[bytes]] = {
    "/v1/chat/completions": _OPENAI_END,
    "/v1/completions": _OPENAI_END,
    "/v1/messages": re.compile(rb"^event: ?message_stop", re.MULTILINE),
    "/v1/responses": re.compile(rb'"type":"response\.(?:completed|incomplete)"'),
}
"""The end mark within the last event, by path; streams of other paths have none. The last event of `/v1/responses`
repeats the whole answer, so that often only its end is in the tail."""
_ERROR = re.compile(rb'(?:event: ?error|(?:data: ?)?\{"error":)')
_EVENT_ERROR = (b'data: {"error":', b'data:{"error":', b'data: {"object":"error"')
"""How an event with an error begins that a server with OpenAI's API sends before its end mark."""
_FAILED = b'"type":"response.failed"'
_NAMELESS = b'"model":""'
_PROMPT = re.compile(rb'"(?:prompt_eval_count|prompt_tokens|input_tokens)":(\d+)')
_CACHED = re.compile(rb'"(cache_read|cache_creation)_input_tokens":(\d+)')
"""Anthropic's API counts these apart from `input_tokens`."""
_OUTPUT = re.compile(rb'"(?:eval_count|completion_tokens|output_tokens)":(\d+)')


class Tokens(NamedTuple):
    """Token counts of the server; None if the reply does not report them."""

    prompt: int | None = None
    output: int | None = None


def tokens_of(tail: bytes) -> Tokens:
    """The counts in a reply's last bytes: the last of each kind, since several events may repeat them."""
    prompts, outputs = _PROMPT.findall(tail), _OUTPUT.findall(tail)
    cached = sum(int(count) for count in dict(_CACHED.findall(tail)).values()) if b'"cache_' in tail else 0
    return Tokens(int(prompts[-1]) + cached if prompts else None, int(outputs[-1]) if outputs else None)


class StreamEnd(Enum):
    """What the end of a whole stream says."""

    COMPLETE = "complete"
    """It has its protocol's end mark, or its path has none."""
    ERROR = "error"
    """It ends with an error in its protocol's form."""
    MISSING = "missing"
    """It just ends: to many clients the truncated answer looks complete."""


def end_of_stream(path: str, tail: bytes) -> StreamEnd:
    """Classifies the last bytes, without framing, of a stream with status 200 (NDJSON or server-sent events)."""
    if path.startswith("/api/"):
        last = tail.rstrip().rpartition(b"\n")[2]
        is_complete = _LAST_LINE.search(last) is not None and not last.endswith(_NOT_DONE)
    else:
        marked = _LAST_EVENTS.get(path)
        if marked is None:
            return StreamEnd.COMPLETE
        *before, last = _EVENT_BREAK.split(tail.rstrip())
        is_complete = marked.search(last) is not None
        if is_complete and before and before[-1].startswith(_EVENT_ERROR):
            return StreamEnd.ERROR  # vLLM's way to say that its engine is dead
    if is_complete:
        return StreamEnd.COMPLETE
    return StreamEnd.ERROR if _ERROR.match(last) or _FAILED in last else StreamEnd.MISSING


def runner_died(status: int, is_stream: bool, path: str, tail: bytes) -> bool:
    """Whether a reply ended because its runner died.

    A stream of `/v1/messages` or `/v1/responses` that just stops may also have reached the limit on repeated tokens. It
    counts as a death: an unnecessary reload costs seconds, but a dead runner mistaken for a live one costs the next
    client its response.
    """
    if status != 200 or not is_stream:
        return status == 500 and any(message in tail for message in RUNNER_DIED)
    if end_of_stream(path, tail) is StreamEnd.COMPLETE:
        return False
    if path in ("/v1/messages", "/v1/responses"):
        return True
    last = tail[-1024:]
    return _NAMELESS in last or (b'"error":' in last and any(message in last for message in RUNNER_DIED))
