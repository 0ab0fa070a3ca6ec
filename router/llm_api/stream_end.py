"""How an answer ended, read from its last bytes: whole, cut short, or because its runner died.

A server hides most deaths: a stream whose runner is killed ends cleanly, with an error line on `/api`, with one event
that names no model on `/v1/chat/completions`, and with nothing at all on the other two. Only the tail is looked at, so
that it costs nothing a token. It decides nothing.

Sources: seen on 0.24.0 and 0.32.15 (`runner-killed-*` and `repeat-limit-*` in the recordings).
"""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL_BYTES = 4096
"""So much of an answer's end is kept; the last line of `/api/generate` may be longer, its counts stand at its end."""

RUNNER_DIED = (b"process no longer running", b"unexpected EOF", b"connection reset", b"connection refused")
"""In a server's own words, before or within an answer."""

_TERMINATORS = (b'"done":true', b"data: [DONE]", b"event: message_stop", b"event: response.completed")
_NAMELESS = b'"model":""'
_PROMPT = re.compile(rb'"(?:prompt_eval_count|prompt_tokens|input_tokens)":(\d+)')
_OUTPUT = re.compile(rb'"(?:eval_count|completion_tokens|output_tokens)":(\d+)')


class Tokens(NamedTuple):
    """Tokens as the server counts them; None where the answer does not tell."""

    prompt: int | None = None
    output: int | None = None


def tokens_of(tail: bytes) -> Tokens:
    """The counts in an answer's last bytes: the last of each kind, where several events repeat them."""
    prompts, outputs = _PROMPT.findall(tail), _OUTPUT.findall(tail)
    return Tokens(int(prompts[-1]) if prompts else None, int(outputs[-1]) if outputs else None)


def is_whole_stream(tail: bytes) -> bool:
    """Whether a stream's last bytes hold its protocol's terminator."""
    return any(terminator in tail for terminator in _TERMINATORS)


def runner_died(status: int, is_stream: bool, path: str, tail: bytes) -> bool:
    """Whether the end of an answer is that of one whose runner died.

    A stream of `/v1/messages` or `/v1/responses` that just stops may also have met the limit on repeated tokens; it
    counts as a death, because a load too many costs seconds and a dead runner taken for a living one costs the next
    client its answer.
    """
    if status != 200 or not is_stream:
        return status == 500 and any(words in tail for words in RUNNER_DIED)
    if is_whole_stream(tail):
        return False
    if path in ("/v1/messages", "/v1/responses"):
        return True
    last = tail[-1024:]
    return _NAMELESS in last or (b'"error":' in last and any(words in last for words in RUNNER_DIED))
