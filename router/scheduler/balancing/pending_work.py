"""The pending work of each replica: prompts to evaluate before a new one, and streams that run at the same time.

Work is counted in tokens and converted to seconds by the speed of the replica. It is recorded only for models with
several replicas, loaded or coming; with one replica there is nothing to choose. The speeds are learned from requests
that have ended (`throughput.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from router.domain.request import Ticket
from router.domain.residency import ResidencyKey
from router.scheduler.balancing.throughput import STREAM_SHARE, ThroughputModel, correction

OUTPUT_TOKENS = 256
"""Assumed length of an answer; less if the request limits it."""

SAMPLE_TOKENS_MIN = 128
"""Shorter prompts are not used to measure how fast prompts are evaluated."""
_STREAM_TOKENS_MIN = 8
"""Shorter answers are not used to measure the duration of a step: they may not have been streamed."""


@dataclass(slots=True)
class PendingWork:
    """Work that one replica was given and has not done yet. Mutable, owned by `FleetState`."""

    prompts_until: float = float("-inf")
    """When all its prompts will be evaluated, one after the other."""
    output_tokens: int = 0
    """Expected output of its running requests, in total."""
    requests: int = 0

    def ahead_seconds(self, now: float) -> float:
        """Seconds until a prompt that arrives now can be evaluated."""
        return max(0.0, self.prompts_until - now)


IDLE: Final = PendingWork()
"""Placeholder for a replica without work; read-only."""


class WorkShare(NamedTuple):
    """The part of one request in the pending work of its replica, as expected at the grant."""

    prompt_seconds: float
    """Time to evaluate its prompt, without the cached part."""
    output_tokens: int
    sample_tokens: int
    """Prompt tokens to measure the prompt speed with; 0 if the prompt is short, mostly cached, or was queued behind
    others."""
    concurrent: int
    """Requests that were running there already."""
    fingerprints: tuple[int, ...] = ()
    """Fingerprints of the beginning of its prompt."""


def expected_output(ticket: Ticket) -> int:
    """Expected output tokens of a request."""
    limit = ticket.output_tokens_max
    return OUTPUT_TOKENS if limit is None or limit < 0 else min(OUTPUT_TOKENS, limit)


def begin(work: PendingWork, share: WorkShare, now: float) -> None:
    """Adds a request that was granted a slot."""
    work.requests += 1
    work.output_tokens += share.output_tokens
    work.prompts_until = max(work.prompts_until, now) + share.prompt_seconds


def end(work: PendingWork, share: WorkShare, has_begun: bool, now: float) -> None:
    """Removes a request that has ended. `has_begun`: a byte of its response arrived, so its prompt was evaluated."""
    work.requests -= 1
    work.output_tokens -= share.output_tokens
    if not work.requests:
        work.prompts_until = now
    elif not has_begun:
        work.prompts_until -= min(share.prompt_seconds, work.ahead_seconds(now))


def sample_tokens(tokens: int, cached_tokens: int, ahead_seconds: float) -> int:
    """`WorkShare.sample_tokens` of a prompt with `tokens` to evaluate and `cached_tokens` more in the cache."""
    return tokens if tokens >= SAMPLE_TOKENS_MIN and tokens >= cached_tokens and ahead_seconds <= 0.0 else 0


def learn(
    speeds: ThroughputModel, key: ResidencyKey, share: WorkShare, times: tuple[float, float, float], output_tokens: int
) -> None:
    """Corrects the speed of a replica by one ended stream. `times`: of its grant, its first byte and its end."""
    granted_at, first_at, ended_at = times
    throughput = speeds.known.get(key)
    if throughput is None or output_tokens < _STREAM_TOKENS_MIN or not granted_at <= first_at <= ended_at:
        return
    step = throughput.step_seconds
    prompt_factor, tokens = 1.0, share.sample_tokens
    if tokens:
        prompt_factor = correction(tokens * throughput.prompt_seconds + step, first_at - granted_at)
    expected_seconds = step * (1.0 + STREAM_SHARE * share.concurrent) * (output_tokens - 1)
    speeds.correct(key, prompt_factor, correction(expected_seconds, ended_at - first_at))
