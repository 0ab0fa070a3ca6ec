"""The time lines of the last hour: sampled, merged into points, and bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceName
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.observability.last_hour import HOUR_SECONDS, POINT_SECONDS, LastHour, quantile
from router.observability.metrics import BUCKETS_SECONDS, RequestMetrics, RequestTotals
from router.observability.running_request import RunningRequest
from tests.scheduler.builders import MIB, gpu, gpu_id, model, residency, snapshot, view

TINY = model("tiny")
_NO_COUNTS = (0,) * (len(BUCKETS_SECONDS) + 1)


class _Requests:
    """What the router has counted, and what runs."""

    def __init__(self) -> None:
        self.totals = RequestTotals(0, 0, _NO_COUNTS)
        self.running: list[RunningRequest] = []

    def hour(self) -> LastHour:
        hour = LastHour(lambda: self.totals)
        hour.running_requests = lambda: self.running
        return hour

    def stream(self, chunks: int) -> None:
        name = InstanceName("gpu0")
        self.running = [RunningRequest("r", "c", "", "tiny", name, "/api/chat", 0.0, 0.0, 1.0, chunks)]
        self.totals = replace(self.totals, running=1)

    def end(self, tokens: int) -> None:
        self.running = []
        self.totals = replace(self.totals, running=0, output_tokens=self.totals.output_tokens + tokens)


def _at(now: float, *loaded: Residency, utilization: float | None = None) -> Snapshot:
    board = replace(gpu(0, 20_000), utilization_ratio=utilization)
    return snapshot([board], [view("gpu0", 0)], loaded, now=now)


def test_tokens_are_counted_while_they_stream_and_once() -> None:
    requests = _Requests()
    hour = requests.hour()
    hour.sample(_at(0.0), 0)
    requests.stream(50)
    hour.sample(_at(5.0), 0)
    assert hour.points[-1].tokens_per_second == 10.0
    requests.end(100)
    hour.sample(_at(POINT_SECONDS), 0)
    assert hour.points[-1].tokens_per_second == 10.0
    hour.sample(_at(POINT_SECONDS + 1.0), 0)
    assert hour.points[-1].tokens_per_second == 0.0


def test_a_point_has_the_most_of_its_samples_and_the_mean_use() -> None:
    requests = _Requests()
    hour = requests.hour()
    for second, waiting, use in ((0.0, 1, 0.2), (1.0, 7, 0.4), (2.0, 0, None)):
        hour.sample(_at(second, utilization=use), waiting)
    (point,) = hour.points
    assert (point.at, point.waiting) == (0.0, 7)
    assert point.utilization_ratio == pytest.approx(0.3)


def test_the_time_to_the_first_token_is_that_of_the_point_alone() -> None:
    requests = RequestMetrics()
    hour = LastHour(requests.totals)
    requests.record_served("tiny", 0.0, 1.0)
    requests.record_output("tiny", "gpu0", 100.0, None, 5)
    hour.sample(_at(0.0), 0)
    assert hour.points[-1].ttft_p50_seconds is None
    for _ in range(10):
        requests.record_output("tiny", "gpu0", 0.45, None, 5)
    hour.sample(_at(1.0), 0)
    point = hour.points[-1]
    assert point.first_tokens == 10
    assert point.ttft_p50_seconds == pytest.approx(0.375)
    assert point.ttft_p95_seconds is not None and 0.25 < point.ttft_p95_seconds <= 0.5


def test_a_residency_is_followed_from_its_load_to_its_end() -> None:
    hour = _Requests().hour()
    loading = residency("gpu0", TINY, 1000, state=ResidencyState.LOADING)
    hour.sample(_at(1.0, replace(loading, state=ResidencyState.PLANNED)), 0)
    assert hour.spans(1.0) == []
    for now, found in ((2.0, [loading]), (3.0, [loading]), (4.0, [residency("gpu0", TINY, 1000)]), (9.0, [])):
        hour.sample(_at(now, *found), 0)
    assert [(span.is_loading, span.since, span.until) for span in hour.spans(9.0)] == [
        (True, 2.0, 4.0),
        (False, 4.0, 9.0),
    ]
    assert hour.spans(9.0)[0].per_gpu_bytes == ((gpu_id(0), 1000 * MIB),)
    assert hour.spans(9.0 + HOUR_SECONDS) == []


def test_only_the_last_hour_is_kept() -> None:
    hour = _Requests().hour()
    now = 0.0
    while now < 2 * HOUR_SECONDS:
        hour.sample(_at(now), 0)
        now += POINT_SECONDS
    assert len(hour.points) <= HOUR_SECONDS / POINT_SECONDS + 2
    assert hour.points[0].at >= HOUR_SECONDS - 2 * POINT_SECONDS


@given(st.lists(st.integers(0, 5), min_size=len(_NO_COUNTS), max_size=len(_NO_COUNTS)), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_of_its_rank(counts: list[int], ratio: float) -> None:
    found = quantile(counts, ratio)
    if not sum(counts):
        assert found is None
        return
    assert found is not None
    rank = ratio * sum(counts)
    index = next(i for i in range(len(counts)) if sum(counts[: i + 1]) >= rank)
    if index == len(BUCKETS_SECONDS):
        assert found == BUCKETS_SECONDS[-1]
    else:
        assert (BUCKETS_SECONDS[index - 1] if index else 0.0) <= found <= BUCKETS_SECONDS[index]
