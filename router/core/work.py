"""What each of several copies of a model has to do: the prompts that are before a new one, and the streams beside it.

Work is weighed in tokens, and in seconds by how fast the copy is: a long prompt counts for what it holds up, a stream
for what it takes of each step. It is kept for models that have several copies, loaded or on their way; where there is
one, nothing has to be chosen and nothing is noted. From how requests ended it is learned how fast the copies are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.entities import ResidencyKey, Ticket
from router.core.speeds import STREAM_SHARE, Pace, Speeds

OUTPUT_TOKENS = 256
"""An answer is taken to be so long, or as long as it may be at most."""

_PROMPT_TOKENS_MIN = 128
"""A shorter prompt tells little of how fast prompts are evaluated."""
_STREAM_TOKENS_MIN = 8
"""An answer in fewer pieces did not stream, or tells little of how long a step takes."""


@dataclass(slots=True)
class Work:
    """What one copy has been given and has not done; mutable, the fleet's."""

    prompts_until: float = float("-inf")
    """When its prompts are evaluated, if they come one after the other."""
    output_tokens: int = 0
    """What its running requests are expected to write, in all."""
    requests: int = 0

    def ahead_seconds(self, now: float) -> float:
        """What a prompt that comes now waits for."""
        return max(0.0, self.prompts_until - now)


class Share(NamedTuple):
    """One request's part in the work of the copy that serves it, as it was expected when it was granted."""

    work: Work
    pace: Pace
    ahead_seconds: float
    prompt_tokens: int
    """To be evaluated: what the copy holds of the prompt is left out."""
    is_cold: bool
    """Whether most of the prompt is to be evaluated: of others it is not certain how much was."""
    output_tokens: int
    beside: int
    """Requests that ran there already."""

    @property
    def prompt_seconds(self) -> float:
        return self.prompt_tokens * self.pace.prompt_seconds


def expected_output(ticket: Ticket) -> int:
    most = ticket.output_tokens_max
    return OUTPUT_TOKENS if most is None or most < 0 else min(OUTPUT_TOKENS, most)


def begin(share: Share, now: float) -> None:
    """The request has its slot."""
    work = share.work
    work.requests += 1
    work.output_tokens += share.output_tokens
    work.prompts_until = max(work.prompts_until, now) + share.prompt_seconds


def end(share: Share, has_begun: bool, now: float) -> None:
    """The slot is back; with a prompt that may not have been evaluated to its end, where no byte of an answer came."""
    work = share.work
    work.requests -= 1
    work.output_tokens -= share.output_tokens
    if not work.requests:
        work.prompts_until = now
    elif not has_begun:
        work.prompts_until -= min(share.prompt_seconds, work.ahead_seconds(now))


def learn(
    speeds: Speeds,
    key: ResidencyKey,
    share: Share,
    times: tuple[float, float, float],
    output_tokens: int,
) -> None:
    """From a stream: `times` are those of its grant, its first byte and its end."""
    granted_at, first_at, ended_at = times
    if output_tokens < _STREAM_TOKENS_MIN or not granted_at <= first_at <= ended_at:
        return
    pace = share.pace
    if share.is_cold and share.prompt_tokens >= _PROMPT_TOKENS_MIN:
        expected = share.ahead_seconds + share.prompt_seconds + pace.step_seconds
        speeds.prompt_took(key, expected, first_at - granted_at)
    step = pace.step_seconds * (1.0 + STREAM_SHARE * share.beside)
    speeds.steps_took(key, step * (output_tokens - 1), ended_at - first_at)
