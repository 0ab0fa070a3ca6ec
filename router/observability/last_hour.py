"""What the last hour looked like: use of the GPUs, time to first token, tokens per second, the queue, and residency.

Bounded. Sampled at each reading of the GPUs, which happens anyway: it sets no timer and adds nothing to a request.
Samples are merged into points of `POINT_SECONDS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu
from router.observability.metrics import BUCKETS_SECONDS, RequestTotals
from router.observability.running_request import RunningRequest

HOUR_SECONDS = 3600.0
POINT_SECONDS = 10.0
_POINTS_MAX = int(HOUR_SECONDS / POINT_SECONDS) + 1
_SPANS_MAX = 2000
"""Residencies that have ended and are still shown."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the time lines. `at` is its beginning, in seconds of the controller's clock."""

    at: float
    waiting: int
    """Most requests that waited."""
    running: int
    """Most requests that held a slot and were with a server."""
    tokens_per_second: float
    first_tokens: int
    """Responses that began and have ended."""
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    """Of those; None where there were none. Interpolated in the buckets of the metric."""
    utilization_ratio: float | None
    """Mean of the GPUs; None where the driver does not tell it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A model on an instance, in one state, from one reading of the GPUs to another."""

    model: str
    instance: str
    is_loading: bool
    per_gpu_bytes: tuple[tuple[GpuUuid, int], ...]
    since: float
    until: float | None = None
    """None: still so."""


@dataclass(slots=True)
class _Open:
    """The point that is being filled."""

    at: float
    before: RequestTotals
    """The totals at its beginning."""
    before_tokens: int
    waiting: int = 0
    running: int = 0
    utilizations: list[float] = field(default_factory=list[float])


class LastHour:
    """`sample` is called at each reading of the GPUs."""

    def __init__(self, totals: Callable[[], RequestTotals]) -> None:
        self._totals = totals
        self.running_requests: Callable[[], list[RunningRequest]] = list
        """Requests that are with a server now. Set once, by whatever knows the proxy."""
        self._points: deque[Point] = deque(maxlen=_POINTS_MAX)
        self._open: _Open | None = None
        self._latest: Point | None = None
        self._spans: dict[tuple[str, str], Span] = {}
        """What is loaded now, by instance and weights."""
        self._ended: deque[Span] = deque(maxlen=_SPANS_MAX)

    @property
    def points(self) -> list[Point]:
        """Oldest first; the last one is still being filled."""
        return [*self._points, *([self._latest] if self._latest is not None else [])]

    def spans(self, now: float) -> list[Span]:
        """Those of the last hour, ended ones first."""
        return [*(span for span in self._ended if (span.until or now) > now - HOUR_SECONDS), *self._spans.values()]

    def sample(self, snapshot: Snapshot, waiting: int) -> None:
        """Takes note of the state now."""
        totals = self._totals()
        running: Sequence[RunningRequest] = self.running_requests() if totals.running else ()
        tokens = totals.output_tokens + sum(request.chunks for request in running)
        self._fill(snapshot, totals, tokens, waiting, len(running))
        self._follow(snapshot)

    def _fill(self, snapshot: Snapshot, totals: RequestTotals, tokens: int, waiting: int, running: int) -> None:
        now, current = snapshot.now, self._open
        if current is None:
            self._open = current = _Open(now, totals, tokens)
        current.waiting, current.running = max(current.waiting, waiting), max(current.running, running)
        known = [gpu.utilization_ratio for gpu in snapshot.gpus.values() if gpu.utilization_ratio is not None]
        if known:
            current.utilizations.append(sum(known) / len(known))
        self._latest = _point(current, totals, tokens, now)
        if now - current.at >= POINT_SECONDS:
            self._points.append(self._latest)
            self._latest, self._open = None, _Open(now, totals, tokens)

    def _follow(self, snapshot: Snapshot) -> None:
        found = {
            (residency.instance, residency.blob): residency
            for residency in snapshot.residencies.values()
            if residency.state is not ResidencyState.PLANNED
        }
        for key in self._spans.keys() - found.keys():
            self._end(key, snapshot.now)
        for key, residency in found.items():
            span, is_loading = self._spans.get(key), residency.state is ResidencyState.LOADING
            if span is not None and span.is_loading == is_loading and span.model == residency.name:
                continue
            if span is not None:
                self._end(key, snapshot.now)
            self._spans[key] = _span(snapshot, residency, is_loading=is_loading)

    def _end(self, key: tuple[str, str], now: float) -> None:
        span = self._spans.pop(key)
        self._ended.append(Span(span.model, span.instance, span.is_loading, span.per_gpu_bytes, span.since, now))


def _span(snapshot: Snapshot, residency: Residency, *, is_loading: bool) -> Span:
    sizes = tuple(bytes_by_gpu(snapshot, residency))
    return Span(residency.name, residency.instance, is_loading, sizes, snapshot.now)


def _point(current: _Open, totals: RequestTotals, tokens: int, now: float) -> Point:
    counts = [after - before for after, before in zip(totals.ttft_counts, current.before.ttft_counts, strict=True)]
    seconds, used = now - current.at, current.utilizations
    # A stream that was cut off is counted while it runs, and not in the totals.
    produced = max(0, tokens - current.before_tokens)
    return Point(
        at=current.at,
        waiting=current.waiting,
        running=current.running,
        tokens_per_second=produced / seconds if seconds > 0 else 0.0,
        first_tokens=sum(counts),
        ttft_p50_seconds=quantile(counts, 0.5),
        ttft_p95_seconds=quantile(counts, 0.95),
        utilization_ratio=sum(used) / len(used) if used else None,
    )


def quantile(counts: Sequence[int], ratio: float) -> float | None:
    """A quantile of durations by their counts in `BUCKETS_SECONDS`, in seconds, interpolated as Prometheus does.

    None without counts. Above the last bound: that bound.
    """
    total = sum(counts)
    if not total:
        return None
    rank, below = ratio * total, 0
    for index, count in enumerate(counts[:-1]):
        if count and below + count >= rank:
            lower = BUCKETS_SECONDS[index - 1] if index else 0.0
            return lower + (BUCKETS_SECONDS[index] - lower) * (rank - below) / count
        below += count
    return BUCKETS_SECONDS[-1]
