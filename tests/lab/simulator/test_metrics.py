"""The figures of a run."""

from __future__ import annotations

import pytest

from router.lab.simulator.metrics import (
    Punctuality,
    is_in_ten_seconds,
    is_in_time,
    jain,
    jain_index,
    punctuality,
    quantile,
    service_jain,
    swap_seconds,
    ttft_percentiles,
)
from router.lab.simulator.requests import HUNG_UP, SERVED, Request
from tests.lab.simulator.machines import model, request

MODEL = model("m", 5)


def ended(number: int, ttft: float, *, tokens: int = 101, rate: float = 50.0, outcome: str = SERVED) -> Request:
    one = request(number, MODEL, tokens=tokens)
    one.first_token_at = ttft
    one.ended_at = ttft + (tokens - 1) / rate if tokens > 1 else ttft
    one.outcome = outcome
    return one


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (ended(1, 9.9), True),
        (ended(1, 10.1), False),
        (ended(1, 1.0, rate=6.8), True),
        (ended(1, 1.0, rate=6.6), False),
        (ended(1, 1.0, tokens=1), True),
        (ended(1, 1.0, tokens=0), True),
        (ended(1, 1.0, outcome="load_failed"), False),
        (ended(1, 1.0, outcome=HUNG_UP), False),
    ],
)
def test_within_ten_seconds_is_a_first_token_by_then_and_a_fast_enough_rest(one: Request, expected: bool) -> None:
    assert is_in_ten_seconds(one) is expected


def test_in_time_allows_one_warm_swap_of_the_model_more() -> None:
    assert swap_seconds(MODEL) == pytest.approx(0.8 + 1.2 + MODEL.weights_bytes / 4.9e9)
    limit = 10.0 + swap_seconds(MODEL)
    soon, late, slow = ended(1, limit - 0.1), ended(2, limit + 0.1), ended(3, 1.0, rate=6.6)
    assert [is_in_time(one) for one in (soon, late, slow)] == [True, False, False]
    found = punctuality([soon, late, slow, ended(4, 1.0)], missing=1)
    assert found == Punctuality(requests=5, in_time=2, in_ten_seconds=1)
    assert (found.in_time_share, found.in_ten_seconds_share) == (0.4, 0.2)


def test_quantiles_are_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([], 0.5) == 0.0


def test_a_failed_request_counts_as_waiting_to_the_end() -> None:
    percentiles = ttft_percentiles([ended(1, 1.0), ended(2, 1.0, outcome="load_failed")], 100.0)
    assert (percentiles.count, percentiles.p50, percentiles.p99) == (2, 1.0, 100.0)


def test_a_refused_request_has_no_wait() -> None:
    percentiles = ttft_percentiles([ended(1, 1.0), ended(2, 0.0, outcome="model_too_large")], 1352.0)
    assert (percentiles.count, percentiles.p95, percentiles.p99) == (1, 1.0, 1.0)


def test_jain_is_one_for_equal_shares_and_one_over_n_for_a_single_winner() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([]) == 1.0


def test_users_who_never_waited_are_left_out_of_jain() -> None:
    happy, served, starved = ended(1, 0.1), ended(2, 5.0), ended(3, 50.0)
    happy.user, served.user, starved.user = "a", "b", "c"
    assert jain([happy, served, starved]) == pytest.approx(0.5)


def test_service_counts_tokens_of_answers_that_ended_in_the_window() -> None:
    early, late, other = ended(1, 1.0), ended(2, 60.0), ended(3, 2.0)
    other.user = "other"
    assert service_jain([early, late, other], 0.0, 50.0) == pytest.approx(1.0)
    assert service_jain([early, late, other], 0.0, 100.0) < 1.0
