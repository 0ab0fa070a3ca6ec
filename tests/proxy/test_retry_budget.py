"""Retries are bounded by a share of the requests of the last minute, with a floor for single users."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.proxy.retry_budget import RATIO_MAX, RETRIES_MIN, WINDOW_SECONDS, RetryBudget


def test_a_single_user_may_retry() -> None:
    budget = RetryBudget()
    budget.request(1000.0)
    assert [budget.try_retry(1000.0) for _ in range(RETRIES_MIN + 1)] == [True] * RETRIES_MIN + [False]


def test_of_many_requests_a_fifth_may_be_tried_again() -> None:
    budget = RetryBudget()
    for number in range(1000):
        budget.request(1000.0 + number / 100)
    assert sum(budget.try_retry(1010.0) for _ in range(1000)) == 200


def test_requests_and_retries_are_forgotten_after_a_minute() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.request(1000.0)
    assert sum(budget.try_retry(1059.0) for _ in range(300)) == 200
    assert sum(budget.try_retry(1061.0) for _ in range(300)) == 0
    assert sum(budget.try_retry(1120.0) for _ in range(300)) == RETRIES_MIN


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.booleans()), max_size=300))
def test_in_any_minute_at_most_the_share_or_the_floor_is_retried(steps: list[tuple[float, bool]]) -> None:
    budget, now = RetryBudget(), 0.0
    requests: list[int] = []
    retries: list[int] = []
    for seconds, is_retry in steps:
        now += seconds
        second = int(now)
        if not is_retry:
            budget.request(now)
            requests.append(second)
        elif budget.try_retry(now):
            retries.append(second)
        recent_retries = sum(at > second - WINDOW_SECONDS for at in retries)
        recent_requests = sum(at > second - WINDOW_SECONDS for at in requests)
        if is_retry and retries and retries[-1] == second:
            assert recent_retries <= max(RETRIES_MIN, RATIO_MAX * recent_requests) + 1
