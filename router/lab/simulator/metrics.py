"""Figures of a run: share in time, time to first token, bytes loaded, fairness, GPU utilisation. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from router.domain.model import ModelFacts
from router.lab.simulator.requests import HUNG_UP, SERVED, Request
from router.lab.simulator.runner import Outcome
from router.lab.simulator.world import WORLD, load_seconds

FIRST_TOKEN_SECONDS = 10.0
TOKENS_PER_SECOND = 6.7
_WAITED_SECONDS = 1.0


REFUSED = frozenset({"model_too_large", "queue_full", "no_instance", "layout_unavailable", "model_not_found"})
"""Outcomes of requests that get an answer, a refusal, without waiting for a slot or a load."""


@dataclass(frozen=True, slots=True)
class TtftPercentiles:
    """Time to first token of a class of requests, in seconds, refused ones left out.

    A failed request counts as waiting to the end: otherwise failing slow requests would improve the percentiles.
    """

    count: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Punctuality:
    """How many of these requests were answered soon enough, by two measures. Those that hung up are not counted."""

    requests: float
    in_time: float
    """First token within 10 s plus one warm swap of the model."""
    in_ten_seconds: float
    """First token within 10 s."""

    @property
    def in_time_share(self) -> float:
        return self.in_time / self.requests if self.requests else 1.0

    @property
    def in_ten_seconds_share(self) -> float:
        return self.in_ten_seconds / self.requests if self.requests else 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run, or their means over several."""

    requests: float
    punctuality: Punctuality
    small_punctuality: Punctuality
    """Of models that one GPU holds."""
    large_punctuality: Punctuality
    errors: float
    """Requests that were not served: `refused`, and all others, which failed."""
    refused: float
    hung_up: float
    small: TtftPercentiles
    large: TtftPercentiles
    tokens_per_second: float
    loads: float
    loaded_gb: float
    spills: float
    out_of_memory: float
    jain: float
    busy_shares: tuple[float, ...]
    seconds: float

    @property
    def in_time_share(self) -> float:
        return self.punctuality.in_time_share

    @property
    def in_ten_seconds_share(self) -> float:
        return self.punctuality.in_ten_seconds_share

    @property
    def failed(self) -> float:
        return self.errors - self.refused

    @property
    def served(self) -> float:
        return self.requests - self.hung_up - self.errors

    def as_dict(self) -> dict[str, object]:
        return {
            **asdict(self),
            "served": self.served,
            "failed": self.failed,
            "in_time_share": self.in_time_share,
            "in_ten_seconds_share": self.in_ten_seconds_share,
        }


def swap_seconds(model: ModelFacts) -> float:
    """One warm swap: another model's runner ends, and the weights are read from the page cache."""
    return WORLD.unload_seconds + load_seconds(WORLD, model.weights_bytes, warm=True)


def is_in_time(request: Request) -> bool:
    """Served, first token within 10 s plus one warm swap of the model, then at least 6.7 tokens/s.

    A large model that is not loaded cannot answer within 10 s, whatever the schedule: its load alone takes longer.
    """
    return _begins_within(request, FIRST_TOKEN_SECONDS + swap_seconds(request.model))


def is_in_ten_seconds(request: Request) -> bool:
    """Served, first token within 10 s, then at least 6.7 tokens/s."""
    return _begins_within(request, FIRST_TOKEN_SECONDS)


def _begins_within(request: Request, seconds: float) -> bool:
    ttft, rate = request.ttft_seconds, request.tokens_per_second
    if request.outcome != SERVED or ttft is None:
        return False
    return ttft <= seconds and (rate is None or rate >= TOKENS_PER_SECOND)


def punctuality(requests: Sequence[Request], missing: int = 0) -> Punctuality:
    """`missing`: requests that were planned and never sent."""
    return Punctuality(len(requests) + missing, sum(map(is_in_time, requests)), sum(map(is_in_ten_seconds, requests)))


def report(outcome: Outcome, large_models: frozenset[str]) -> Report:
    """`large_models`: names of the models that no single GPU holds."""
    counted = [r for r in outcome.requests if r.outcome != HUNG_UP]
    generated_tokens = sum(r.generated_tokens for r in counted if r.outcome == SERVED)
    ledger, stats = outcome.ledger, outcome.stats
    small = [r for r in counted if r.model.name not in large_models]
    large = [r for r in counted if r.model.name in large_models]
    duration = max(1e-9, outcome.ended_at)
    return Report(
        requests=outcome.planned,
        punctuality=punctuality(counted, outcome.planned - len(outcome.requests)),
        small_punctuality=punctuality(small),
        large_punctuality=punctuality(large),
        errors=sum(r.outcome != SERVED for r in counted) + outcome.planned - len(outcome.requests),
        refused=sum(r.outcome in REFUSED for r in counted),
        hung_up=len(outcome.requests) - len(counted),
        small=ttft_percentiles(small, outcome.ended_at),
        large=ttft_percentiles(large, outcome.ended_at),
        tokens_per_second=generated_tokens / duration,
        loads=stats.loads,
        loaded_gb=stats.loaded_bytes / 1e9,
        spills=stats.spilled_loads,
        out_of_memory=ledger.out_of_memory,
        jain=jain(counted),
        busy_shares=tuple(ledger.busy_seconds(gpu.uuid, outcome.ended_at) / duration for gpu in ledger.gpus),
        seconds=outcome.ended_at,
    )


def mean_report(reports: Sequence[Report]) -> Report:
    """The mean of each figure. The reports are of one rig."""

    def mean(figure: Callable[[Report], float]) -> float:
        return sum(map(figure, reports)) / len(reports)

    def percentiles(of: Callable[[Report], TtftPercentiles]) -> TtftPercentiles:
        return TtftPercentiles(
            mean(lambda r: of(r).count), mean(lambda r: of(r).p50), mean(lambda r: of(r).p95), mean(lambda r: of(r).p99)
        )

    def shares(of: Callable[[Report], Punctuality]) -> Punctuality:
        return Punctuality(
            mean(lambda r: of(r).requests), mean(lambda r: of(r).in_time), mean(lambda r: of(r).in_ten_seconds)
        )

    return Report(
        requests=mean(lambda r: r.requests),
        punctuality=shares(lambda r: r.punctuality),
        small_punctuality=shares(lambda r: r.small_punctuality),
        large_punctuality=shares(lambda r: r.large_punctuality),
        errors=mean(lambda r: r.errors),
        refused=mean(lambda r: r.refused),
        hung_up=mean(lambda r: r.hung_up),
        small=percentiles(lambda r: r.small),
        large=percentiles(lambda r: r.large),
        tokens_per_second=mean(lambda r: r.tokens_per_second),
        loads=mean(lambda r: r.loads),
        loaded_gb=mean(lambda r: r.loaded_gb),
        spills=mean(lambda r: r.spills),
        out_of_memory=mean(lambda r: r.out_of_memory),
        jain=mean(lambda r: r.jain),
        busy_shares=tuple(sum(busy) / len(busy) for busy in zip(*(r.busy_shares for r in reports), strict=True)),
        seconds=mean(lambda r: r.seconds),
    )


def ttft_percentiles(requests: Sequence[Request], ended_at: float) -> TtftPercentiles:
    waits = (
        r.ttft_seconds if r.outcome == SERVED and r.ttft_seconds is not None else ended_at - r.arrived_at
        for r in requests
        if r.outcome not in REFUSED
    )
    values = sorted(waits)
    return TtftPercentiles(len(values), quantile(values, 0.50), quantile(values, 0.95), quantile(values, 0.99))


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank quantile of sorted values; 0 if there are none."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, max(0, -(-int(share * 1000) * len(values) // 1000) - 1))]


def jain(requests: Sequence[Request]) -> float:
    """Jain's index of the users' shares of requests in time, over the users with any request that waited; 1 is fair."""
    by_user: dict[str, list[Request]] = {}
    for request in requests:
        by_user.setdefault(request.user, []).append(request)
    waited = [
        group
        for group in by_user.values()
        if any((r.ttft_seconds or _WAITED_SECONDS) >= _WAITED_SECONDS for r in group)
    ]
    return jain_index([sum(is_in_time(r) for r in group) / len(group) for group in waited])


def service_jain(requests: Sequence[Request], begin: float, end: float) -> float:
    """Jain's index of the service each user got in a window in which all are backlogged.

    Service is the tokens of answers that ended in the window; generated tokens count twice (virtual token counter,
    arXiv 2401.00588).
    """
    service = dict.fromkeys(sorted({request.user for request in requests}), 0.0)
    for request in requests:
        if request.outcome == SERVED and request.ended_at is not None and begin <= request.ended_at < end:
            service[request.user] += request.prompt_tokens + 2 * request.generated_tokens
    return jain_index(list(service.values()))


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n * sum x^2); 1 if all values are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
