"""Where a server is known not to answer as the recorded 0.24.0 did, and why. Data; `test_recordings` applies it.

A difference that is listed but is not seen any more fails its test too, unless it depends on the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """Differences that may be seen: whole names of recordings and lines of `differences`, both as patterns."""

    names: str
    lines: str
    reason: str
    always: bool = True
    """False where the run decides whether the difference shows."""


RUN = (
    Known(
        r"0\.24\.0/(tags|accept-gzip)|first/v1-models",
        r"\.headers\.Transfer-Encoding: not there in the recording",
        "the store holds more models here, and lists over 2 kB are sent in chunks",
        always=False,
    ),
    Known(
        r"0\.24\.0/chat-format-json",
        r"\.body\.json\.done_reason: 'length' instead of 'stop'",
        "whether noise closes a JSON object within 40 words belongs to the model",
        always=False,
    ),
)
"""For every server."""

_SINCE_0_11_4 = (
    Known(
        r".*/(error-|overload-|does-not-fit-)?v1-(messages|responses)(?!-count).*",
        r".*(404|text/plain|instead of 'text/event-stream'|: missing).*",
        "/v1/messages and /v1/responses came after 0.11.4",
    ),
    Known(r"0\.24\.0/(status|experimental-web-search)", r".*", "the path came after 0.11.4"),
    Known(
        r"(first|0\.24\.0)/error-(chat-|v1-chat-completions-|)(unknown-model|model-unknown)|first/error-v1-model-unknown",
        r"\.body\.json\.error(\.message)?: .*try pulling it first.*|\.body\.json\.error\.type: 'api_error' .*",
        "chat named an unknown model as embed does",
    ),
    Known(
        r"0\.24\.0/error-(embed-no-model-field|v1-embeddings-no-model)",
        r""".*'model "" not found, try pulling it first' instead.*|\.body\.json\.error\.type: 'api_error' .*""",
        "embed without a model said it in other words",
    ),
    Known(
        r"0\.24\.0/(error-v1-.*-(no|unknown)-model|v1-model-unknown|v1-chat-tools-unsupported)",
        r"\.body\.json\.error\.type: 'api_error' instead of '(not_found|invalid_request)_error'",
        "the status did not decide the error's type on /v1",
    ),
    Known(
        r"0\.24\.0/(create-nothing|error-bad-format|runner-killed-while-waiting)",
        r"\.status: 200 .*|\.headers\.Content-Type: 'application/x-ndjson' .*|\.body: .*",
        "an error before a stream's first line was a line of the stream",
    ),
    Known(
        r"0\.24\.0/error-bad-name",
        r".*'model is required' instead of 'invalid model name'",
        "a name that cannot be read counted as absent",
    ),
    Known(
        r"0\.24\.0/((chat|generate)-think-(once|stream)|v1-chat-reasoning-stream)",
        r".*(thinking|reasoning): missing|.*(content|response): '<text>' instead of ''",
        "a template that ends the prompt with <think> was not taken as thinking",
    ),
    Known(
        r"0\.24\.0/chat-think-unsupported",
        r".*'registry\.ollama\.ai/library/tiny:latest does not support thinking' instead of .*",
        "the model was named in full",
    ),
    Known(r"0\.24\.0/chat-tools-(once|stream)", r".*tool_calls\[0\]\.(id|function\.index): missing", "calls had no id"),
    Known(
        r"0\.24\.0/runner-killed-.*",
        r".*'model runner has unexpectedly stopped, .*|.*no longer running.*",
        "whichever of the runner's end and its broken answer the server notices first names the error",
        always=False,
    ),
    Known(r"0\.24\.0/embed-too-long", r".*'input length exceeds maximum context length' .*", "other words"),
    Known(r"0\.24\.0/generate-logprobs", r"\.body\.json\.logprobs: missing", "logprobs came after 0.11.4"),
    Known(r"0\.24\.0/v1-embeddings-base64", r".*'<numbers>' instead of '<text>'", "base64 came after 0.11.4"),
    Known(
        r"0\.24\.0/(v1-)?model-cloud-suffix",
        r"\.status: 404 .*|.*not found, try pulling it first.*|.*Content-Type.*|.*newline.*",
        "0.11.4 knows no cloud",
    ),
    Known(r"0\.24\.0/version", r"\.body\.json\.version: .*", "another version", always=False),
)
"""What the real server that the tests run answers otherwise, and the emulation of it likewise."""

KNOWN: Mapping[str, tuple[Known, ...]] = {"0.11.4": _SINCE_0_11_4, "0.24.0": ()}
"""By version. There is none for an emulated 0.24.0: each would be a fault of the emulation."""

OTHER_MODEL = frozenset({"first/chat-format", "first/chat-once", "first/ps-loaded", "first/show", "first/tags"})
"""Recorded with a model of other words and shape; the second set holds the same exchanges with a model like ours."""


def unexplained(name: str, lines: list[str], known: tuple[Known, ...]) -> list[str]:
    """Differences that nothing explains, and explanations that nothing needs."""
    fitting = [one for one in known if re.fullmatch(one.names, name)]
    open_lines = [line for line in lines if not any(re.fullmatch(one.lines, line, re.S) for one in fitting)]
    stale = [f"no longer differs: {one.reason}" for one in fitting if one.always and not lines]
    return open_lines + stale
