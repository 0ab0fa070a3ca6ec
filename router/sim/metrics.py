"""What a run means: shares in time, waits by class of model, bytes loaded, fairness, busy cards. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from router.sim.requests import HUNG_UP, SERVED, Request
from router.sim.runner import Outcome

FIRST_TOKEN_SECONDS = 10.0
TOKENS_PER_SECOND = 6.7
SMALL, LARGE = "one card", "several cards"


@dataclass(frozen=True, slots=True)
class Waits:
    """Time to the first token of a class of requests, in seconds; failed ones count as the longest."""

    count: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run in figures."""

    requests: int
    in_time: int
    errors: int
    hung_up: int
    small: Waits
    large: Waits
    tokens_per_second: float
    loads: int
    loaded_gb: float
    spills: int
    out_of_memory: int
    jain: float
    busy_shares: tuple[float, ...]
    seconds: float

    @property
    def in_time_share(self) -> float:
        counted = self.requests - self.hung_up
        return self.in_time / counted if counted else 1.0

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "in_time_share": self.in_time_share}


def is_in_time(request: Request) -> bool:
    """First token within 10 s, then at least 6.7 tokens/s, and an answer at all."""
    ttft, rate = request.ttft_seconds, request.tokens_per_second
    if request.outcome != SERVED or ttft is None:
        return False
    return ttft <= FIRST_TOKEN_SECONDS and (rate is None or rate >= TOKENS_PER_SECOND)


def report(outcome: Outcome, large_models: frozenset[str]) -> Report:
    """`large_models`: names of those that no single card of the rig holds."""
    counted = [r for r in outcome.requests if r.outcome != HUNG_UP]
    made = sum(r.generated_tokens for r in counted if r.outcome == SERVED)
    book, tally = outcome.book, outcome.tally
    span = max(1e-9, outcome.ended_at)
    return Report(
        requests=outcome.planned,
        in_time=sum(is_in_time(r) for r in counted),
        errors=sum(r.outcome != SERVED for r in counted) + outcome.planned - len(outcome.requests),
        hung_up=len(outcome.requests) - len(counted),
        small=waits([r for r in counted if r.model.name not in large_models], outcome.ended_at),
        large=waits([r for r in counted if r.model.name in large_models], outcome.ended_at),
        tokens_per_second=made / span,
        loads=tally.loads,
        loaded_gb=tally.loaded_bytes / 1e9,
        spills=tally.spilled_loads,
        out_of_memory=book.out_of_memory,
        jain=jain(counted),
        busy_shares=tuple(book.busy_seconds(card.uuid, outcome.ended_at) / span for card in book.cards),
        seconds=outcome.ended_at,
    )


def waits(requests: Sequence[Request], ended_at: float) -> Waits:
    values = sorted(r.ttft_seconds if r.outcome == SERVED and r.ttft_seconds is not None else ended_at - r.arrived_at
                    for r in requests)  # fmt: skip
    return Waits(len(values), quantile(values, 0.50), quantile(values, 0.95), quantile(values, 0.99))


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, the nearest rank; 0 of none."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, max(0, -(-int(share * 1000) * len(values) // 1000) - 1))]


def jain(requests: Sequence[Request]) -> float:
    """Jain's index over users of the service they got of what they asked for; 1 is equal treatment.

    A user's service is the share of his requests' time in which they were served and did not wait: asked seconds over
    spent seconds, so that a user who asks for more is not called favoured.
    """
    shares: list[float] = []
    for user in sorted({r.user for r in requests}):
        own = [r for r in requests if r.user == user]
        shares.append(sum(is_in_time(r) for r in own) / len(own))
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
