"""How a reply ended, judging by its last bytes: complete, truncated, or because its runner died.

A server hides most deaths: a stream whose runner is killed ends cleanly, with an error line on `/api`, with one event
that names no model on `/v1/chat/completions`, and without any sign on the other two. Only the tail is inspected, so the
cost per token is zero.

Sources: observed on 0.24.0 and 0.32.15 (`runner-killed-*` and `repeat-limit-*` in the recordings).
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL_BYTES = 4096
"""Bytes kept of a reply's end. The last line of `/api/generate` may be longer, but its counts are at its end."""

RUNNER_DIED = (b"process no longer running", b"unexpected EOF", b"connection reset", b"connection refused")
"""A server's messages for a dead runner, before or within a reply."""

_TERMINATORS = (b'"done":true', b"data: [DONE]", b"event: message_stop", b"event: response.completed")
_NAMELESS = b'"model":""'
_PROMPT = re.compile(rb'"(?:prompt_eval_count|prompt_tokens|input_tokens)":(\d+)')
_OUTPUT = re.compile(rb'"(?:eval_count|completion_tokens|output_tokens)":(\d+)')


class Tokens(NamedTuple):
    """Token counts of the server; None if the reply does not report them."""

    prompt: int | None = None
    output: int | None = None


def tokens_of(tail: bytes) -> Tokens:
    """The counts in a reply's last bytes: the last of each kind, since several events may repeat them."""
    prompts, outputs = _PROMPT.findall(tail), _OUTPUT.findall(tail)
    return Tokens(int(prompts[-1]) if prompts else None, int(outputs[-1]) if outputs else None)


def is_whole_stream(tail: bytes) -> bool:
    """Whether a stream's last bytes contain its protocol's terminator."""
    return any(terminator in tail for terminator in _TERMINATORS)


def runner_died(status: int, is_stream: bool, path: str, tail: bytes) -> bool:
    """Whether a reply ended because its runner died.

    A stream of `/v1/messages` or `/v1/responses` that just stops may also have reached the limit on repeated tokens. It
    counts as a death: an unnecessary reload costs seconds, but a dead runner mistaken for a live one costs the next
    client its response.
    """
    if status != 200 or not is_stream:
        return status == 500 and any(message in tail for message in RUNNER_DIED)
    if is_whole_stream(tail):
        return False
    if path in ("/v1/messages", "/v1/responses"):
        return True
    last = tail[-1024:]
    return _NAMELESS in last or (b'"error":' in last and any(message in last for message in RUNNER_DIED))
