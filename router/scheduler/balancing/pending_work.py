"""What each of several copies of a model has to do: the prompts that are before a new one, and the streams beside it.

Work is weighed in tokens, and in seconds by how fast the copy is: a long prompt counts for what it holds up, a stream
for what it takes of each step. It is kept for models that have several copies, loaded or on their way; where there is
one, nothing has to be chosen and nothing is noted. From how requests ended it is learned how fast the copies are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from router.domain.request import Ticket
from router.domain.residency import ResidencyKey
from router.scheduler.balancing.throughput import STREAM_SHARE, ThroughputModel, correction

OUTPUT_TOKENS = 256
"""An answer is taken to be so long, or as long as it may be at most."""

TELLING_TOKENS = 128
"""A shorter prompt tells little of how fast prompts are evaluated."""
_STREAM_TOKENS_MIN = 8
"""An answer in fewer pieces did not stream, or tells little of how long a step takes."""


@dataclass(slots=True)
class PendingWork:
    """What one copy has been given and has not done; mutable, the fleet's."""

    prompts_until: float = float("-inf")
    """When its prompts are evaluated, if they come one after the other."""
    output_tokens: int = 0
    """What its running requests are expected to write, in all."""
    requests: int = 0

    def ahead_seconds(self, now: float) -> float:
        """What a prompt that comes now waits for."""
        return max(0.0, self.prompts_until - now)


IDLE: Final = PendingWork()
"""Stands for a copy that has been given nothing yet; to be read only."""


class WorkShare(NamedTuple):
    """One request's part in the work of the copy that serves it, as it was expected when it was granted."""

    prompt_seconds: float
    """To evaluate its prompt, without what the copy holds of it."""
    output_tokens: int
    telling_tokens: int
    """Of its prompt, where it tells how fast prompts are; else 0: it is short, the copy holds most of it, or others
    were before it."""
    concurrent: int
    """Requests that ran there already."""
    fingerprints: tuple[int, ...] = ()
    """Of the beginning of its prompt."""


def expected_output(ticket: Ticket) -> int:
    most = ticket.output_tokens_max
    return OUTPUT_TOKENS if most is None or most < 0 else min(OUTPUT_TOKENS, most)


def begin(work: PendingWork, share: WorkShare, now: float) -> None:
    """The request has its slot."""
    work.requests += 1
    work.output_tokens += share.output_tokens
    work.prompts_until = max(work.prompts_until, now) + share.prompt_seconds


def end(work: PendingWork, share: WorkShare, has_begun: bool, now: float) -> None:
    """The slot is back; with a prompt that may not have been evaluated to its end, where no byte of an answer came."""
    work.requests -= 1
    work.output_tokens -= share.output_tokens
    if not work.requests:
        work.prompts_until = now
    elif not has_begun:
        work.prompts_until -= min(share.prompt_seconds, work.ahead_seconds(now))


def telling(tokens: int, held_tokens: int, ahead_seconds: float) -> int:
    """`Share.telling_tokens` of a prompt with so many to evaluate, beside those that the copy holds."""
    return tokens if tokens >= TELLING_TOKENS and tokens >= held_tokens and ahead_seconds <= 0.0 else 0


def learn(
    speeds: ThroughputModel, key: ResidencyKey, share: WorkShare, times: tuple[float, float, float], output_tokens: int
) -> None:
    """From a stream: `times` are those of its grant, its first byte and its end."""
    granted_at, first_at, ended_at = times
    throughput = speeds.known.get(key)
    if throughput is None or output_tokens < _STREAM_TOKENS_MIN or not granted_at <= first_at <= ended_at:
        return
    step = throughput.step_seconds
    by_prompt, tokens = 1.0, share.telling_tokens
    if tokens:
        by_prompt = correction(tokens * throughput.prompt_seconds + step, first_at - granted_at)
    steps = step * (1.0 + STREAM_SHARE * share.concurrent) * (output_tokens - 1)
    speeds.correct(key, by_prompt, correction(steps, ended_at - first_at))
