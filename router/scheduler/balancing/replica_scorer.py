"""Scores the loaded replicas of a model for the next request.

Replicas that can serve it now are scored by the expected wait in seconds: the prompts ahead of it, its own prompt
without the cached part, and the cost of sharing the replica with running streams. So a conversation returns to the
replica that has it cached, unless the work ahead of it there takes longer than evaluating the prompt elsewhere. A
request never waits for a slot of that replica.

Replicas within `NEAR` of the best are ordered by: most of the prompt cached, fewest requests, served this client last,
least recently used, name. So they take turns, and the same facts always give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.domain.replica_choice import Prospect
from router.scheduler.balancing.pending_work import OUTPUT_TOKENS, PendingWork
from router.scheduler.balancing.throughput import STREAM_SHARE, Throughput

BATCH_TOKENS = 512
"""Tokens of each waiting prompt in one batch."""


NEAR = 0.2
"""Replicas whose wait is at most this ratio longer than the best are equal: speeds and prompts are not known better."""


SIDE_WEIGHT = 0.5
"""Weight of a second by which a stream stalls or an answer takes longer, relative to one until the first token."""


def first_token_seconds(
    throughput: Throughput, work: PendingWork, prompt_tokens: int, concurrent: int, now: float
) -> float:
    """Seconds until the first token: prompts ahead that share its batches, its own prompt, and one step.

    `prompt_tokens`: those to evaluate. `concurrent`: number of requests that run there already.
    """
    prompt = prompt_tokens * throughput.prompt_seconds
    ahead = work.prompts_until - now
    if ahead <= 0.0:
        return prompt + throughput.step_seconds
    if concurrent:
        ahead = min(ahead, concurrent * max(prompt, BATCH_TOKENS * throughput.prompt_seconds))
    return ahead + prompt + throughput.step_seconds


def side_seconds(
    throughput: Throughput, work: PendingWork, prompt_tokens: int, output_tokens: int, concurrent: int
) -> float:
    """Seconds that sharing the replica costs all its requests.

    Each stream stalls while the prompt is evaluated, and every step that two requests share is a little longer.
    """
    other_tokens = work.output_tokens + OUTPUT_TOKENS * (concurrent - work.requests)
    longer_steps = STREAM_SHARE * throughput.step_seconds * min(output_tokens * concurrent, other_tokens)
    return concurrent * prompt_tokens * throughput.prompt_seconds + longer_steps


def waiting_seconds(
    throughput: Throughput, work: PendingWork, prompt_tokens: int, output_tokens: int, concurrent: int, now: float
) -> float:
    """Score of a replica in seconds for a request with these tokens to evaluate and to generate; less is better."""
    if not concurrent and work.prompts_until <= now:  # idle: what the functions below come to
        return prompt_tokens * throughput.prompt_seconds + throughput.step_seconds
    first = first_token_seconds(throughput, work, prompt_tokens, concurrent, now)
    return (
        first + SIDE_WEIGHT * side_seconds(throughput, work, prompt_tokens, output_tokens, concurrent)
        if concurrent
        else first
    )


def best(seconds: Sequence[float], prospects: Sequence[Prospect]) -> int:
    """Index of the best replica: by `seconds`, and by `prospects` among those within `NEAR` of the best."""
    limit = min(seconds) * (1.0 + NEAR)
    if max(seconds) <= limit:
        return prospects.index(min(prospects))
    return min((prospects[index], index) for index, waiting in enumerate(seconds) if waiting <= limit)[1]
