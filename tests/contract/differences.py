"""Known differences between a server's answers and the recorded ones, with reasons. Data for `test_recordings`.

A listed difference that no longer occurs fails its test too, unless it depends on the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownDifference:
    """One allowed difference: patterns for the full recording name and for lines of `differences`."""

    names: str
    lines: str
    reason: str
    always: bool = True
    """False if the difference occurs only in some runs."""


RUN = (
    KnownDifference(
        r"0\.(24|34)\.0/(tags|accept-gzip)|first/v1-models",
        r"\.headers\.Transfer-Encoding: (not there in the recording|missing)",
        "the store holds more or fewer models here, and lists over 2 kB are chunked",
        always=False,
    ),
    KnownDifference(
        r"0\.(24|34)\.0/chat-format-json",
        r"\.body\.json\.done_reason: '(length|stop)' instead of '(length|stop)'",
        "whether a noise model closes a JSON object within 40 tokens depends on its weights",
        always=False,
    ),
)
"""Differences of every server."""

_ADDED_AFTER_0_11_4 = (
    KnownDifference(
        r".*/(error-|overload-|does-not-fit-)?v1-(messages|responses)(?!-count).*",
        r".*(404|text/plain|instead of 'text/event-stream'|: missing).*",
        "/v1/messages and /v1/responses came after 0.11.4",
    ),
    KnownDifference(r"0\.24\.0/(status|experimental-web-search)", r".*", "the path came after 0.11.4"),
    KnownDifference(
        r"(first|0\.24\.0)/error-(chat-|v1-chat-completions-|)(unknown-model|model-unknown)|first/error-v1-model-unknown",
        r"\.body\.json\.error(\.message)?: .*try pulling it first.*|\.body\.json\.error\.type: 'api_error' .*",
        "chat reported an unknown model in the same way as embed",
    ),
    KnownDifference(
        r"0\.24\.0/error-(embed-no-model-field|v1-embeddings-no-model)",
        r""".*'model "" not found, try pulling it first' instead.*|\.body\.json\.error\.type: 'api_error' .*""",
        "embed without a model had a different message",
    ),
    KnownDifference(
        r"0\.24\.0/(error-v1-.*-(no|unknown)-model|v1-model-unknown|v1-chat-tools-unsupported)",
        r"\.body\.json\.error\.type: 'api_error' instead of '(not_found|invalid_request)_error'",
        "the error type on /v1 did not depend on the status",
    ),
    KnownDifference(
        r"0\.24\.0/(create-nothing|error-bad-format|runner-killed-while-waiting)",
        r"\.status: 200 .*|\.headers\.Content-Type: 'application/x-ndjson' .*|\.body: .*",
        "an error before a stream's first line was a line of the stream",
    ),
    KnownDifference(
        r"0\.24\.0/error-bad-name",
        r".*'model is required' instead of 'invalid model name'",
        "an invalid name counted as missing",
    ),
    KnownDifference(
        r"0\.24\.0/((chat|generate)-think-(once|stream)|v1-chat-reasoning-stream)",
        r".*(thinking|reasoning): missing|.*(content|response): '<text>' instead of ''",
        "a template that ends the prompt with <think> was not recognised as thinking",
    ),
    KnownDifference(
        r"0\.24\.0/chat-think-unsupported",
        r".*'registry\.ollama\.ai/library/tiny:latest does not support thinking' instead of .*",
        "the full model name was used",
    ),
    KnownDifference(
        r"0\.24\.0/chat-tools-(once|stream)",
        r".*tool_calls\[0\]\.(id|function\.index): missing",
        "tool calls had no id",
    ),
    KnownDifference(
        r"0\.24\.0/runner-killed-.*",
        r".*'model runner has unexpectedly stopped, .*|.*no longer running.*",
        "the error depends on whether the server first notices the runner's exit or its broken answer",
        always=False,
    ),
    KnownDifference(
        r"0\.24\.0/embed-too-long", r".*'input length exceeds maximum context length' .*", "a different message"
    ),
    KnownDifference(r"0\.24\.0/generate-logprobs", r"\.body\.json\.logprobs: missing", "logprobs came after 0.11.4"),
    KnownDifference(r"0\.24\.0/v1-embeddings-base64", r".*'<numbers>' instead of '<text>'", "base64 came after 0.11.4"),
    KnownDifference(
        r"0\.24\.0/(v1-)?model-cloud-suffix",
        r"\.status: 404 .*|.*not found, try pulling it first.*|.*Content-Type.*|.*newline.*",
        "0.11.4 has no cloud models",
    ),
    KnownDifference(r"0\.24\.0/version", r"\.body\.json\.version: .*", "a different version", always=False),
)
"""Differences of the real server used in tests, and of its emulation."""

_IN_0_34 = (
    KnownDifference(
        r"0\.34\.0/runner-killed-while-waiting",
        r".*\.error: '(llama-server process no longer running|health resp: Get|model runner has unexpectedly).*",
        "the error depends on whether the server first notices the exit, a refused or a reset connection",
        always=False,
    ),
)

KNOWN_DIFFERENCES: Mapping[str, tuple[KnownDifference, ...]] = {
    "0.11.4": _ADDED_AFTER_0_11_4,
    "0.24.0": (),
    "0.34.0": _IN_0_34,
}
"""By version. None for the recorded versions, where each would be a bug in the emulation."""

OTHER_MODEL = frozenset({"first/chat-format", "first/chat-once", "first/ps-loaded", "first/show", "first/tags"})
"""Recorded with a different model; the second set holds the same exchanges with a model like ours."""


def unexplained(name: str, lines: list[str], known: tuple[KnownDifference, ...]) -> list[str]:
    """Differences without an entry, and entries that no longer apply."""
    matching = [entry for entry in known if re.fullmatch(entry.names, name)]
    unmatched = [line for line in lines if not any(re.fullmatch(entry.lines, line, re.S) for entry in matching)]
    stale = [f"no longer differs: {entry.reason}" for entry in matching if entry.always and not lines]
    return unmatched + stale
