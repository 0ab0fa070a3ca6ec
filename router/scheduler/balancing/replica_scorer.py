"""Which loaded copy of a model serves the next request.

Filter (it can serve now), then the least expected waiting: the prompts before it there, its own as far as the copy does
not hold it in its cache, and what the streams beside it cost and lose, in seconds by how fast that copy is. So a
conversation finds the copy that served it before, unless more is ahead of it there than a cold prompt takes elsewhere.
Copies that differ by little are equal: they go by what they hold of the prompt, the fewest requests, who served this
client last, who was used longest ago, and the name, so that they take turns and the same facts always give the same
answer. A request never waits for a slot of its home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.replica_choice import Prospect
from router.domain.request import Ticket
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Engines
from router.scheduler.balancing.pending_work import OUTPUT_TOKENS, PendingWork
from router.scheduler.balancing.throughput import STREAM_SHARE, Throughput

BATCH_TOKENS = 512
"""So much of each waiting prompt is in a batch."""


NEAR = 0.2
"""By so much more waiting a copy is as good as the best: speeds and prompts are not known better."""


SIDE_WEIGHT = 0.5
"""Of a second for which somebody's stream stalls or an answer gets longer, against one of waiting for a first token."""


class Fleet(Protocol):
    """What is read besides the replicas; a snapshot and the state both have it."""

    @property
    def instances(self) -> Mapping[InstanceName, InstanceView]: ...

    @property
    def draining(self) -> Set[ResidencyKey]: ...

    @property
    def engines(self) -> Engines: ...


def suits(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """Returns True where the replica could serve the ticket without a reload, now or when a slot is free."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and residency.blob == ticket.model.blob
        and _serves_as_requested(snapshot, view, residency, ticket)
    )


def can_take(snapshot: Fleet, residency: Residency, ticket: Ticket) -> bool:
    """Returns True where only a free slot may be missing. The replica must be one of the ticket's weights."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and view.state is InstanceState.READY
        and residency.state is ResidencyState.READY
        and _serves_as_requested(snapshot, view, residency, ticket)
        and (not snapshot.draining or (residency.instance, residency.blob) not in snapshot.draining)
    )


def _serves_as_requested(snapshot: Fleet, view: InstanceView, residency: Residency, ticket: Ticket) -> bool:
    if ticket.layout is not None and not ticket.layout.allows(view.spec.gpus):
        return False
    if residency.options == ticket.options:
        return True
    return ticket.is_flexible and snapshot.engines[view.spec.engine].can_adapt(residency, ticket, view.spec)


def first_token_seconds(
    throughput: Throughput, work: PendingWork, prompt_tokens: int, concurrent: int, now: float
) -> float:
    """Until the first token of a request with so many tokens to evaluate, which runs beside so many others there: the
    prompts before it, as far as they are in its batches, its own, and a step."""
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
    """What it costs to share a copy: each stream there stalls while the prompt is evaluated, and every step that two
    are in is a little longer."""
    theirs = work.output_tokens + OUTPUT_TOKENS * (concurrent - work.requests)
    longer = STREAM_SHARE * throughput.step_seconds * min(output_tokens * concurrent, theirs)
    return concurrent * prompt_tokens * throughput.prompt_seconds + longer


def waiting_seconds(
    throughput: Throughput, work: PendingWork, prompt_tokens: int, output_tokens: int, concurrent: int, now: float
) -> float:
    """What a request with so many tokens to evaluate and to write costs there, beside so many others."""
    first = first_token_seconds(throughput, work, prompt_tokens, concurrent, now)
    return (
        first + SIDE_WEIGHT * side_seconds(throughput, work, prompt_tokens, output_tokens, concurrent)
        if concurrent
        else first
    )


def best(seconds: Sequence[float], prospects: Sequence[Prospect]) -> int:
    """Which of the copies: the one with the least waiting; of those that differ by no more than `NEAR`, the one that
    lacks the least of the prompt, has the fewest requests, served this client last, was used longest ago, has the first
    name."""
    limit = min(seconds) * (1.0 + NEAR)
    if max(seconds) <= limit:
        return prospects.index(min(prospects))
    return min((prospects[index], index) for index, waiting in enumerate(seconds) if waiting <= limit)[1]
