"""A key's limits: counted at the head, reserved by estimate, charged by the answer, returned on failure."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.key_budgets import Charge, KeyBudgets
from router.domain.access_key import UNLIMITED, AccessKey, KeyLimits
from router.errors import RateLimited


@dataclass
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def _key(limits: KeyLimits, name: str = "laptop") -> AccessKey:
    return AccessKey(name, "0", "anna", 0.0, limits=limits)


def _begun(budgets: KeyBudgets, key: AccessKey) -> Charge:
    charge = budgets.begin(key, takes_slot=True)
    assert charge is not None
    return charge


def test_a_key_without_limits_costs_nothing() -> None:
    budgets = KeyBudgets(_Clock())
    assert budgets.begin(_key(UNLIMITED), takes_slot=True) is None
    assert len(budgets) == 0


def test_requests_a_minute_come_back_one_by_one() -> None:
    clock = _Clock()
    budgets, key = KeyBudgets(clock), _key(KeyLimits(requests_per_minute=6))
    for _ in range(6):
        _begun(budgets, key).settle(0, 0)
    with pytest.raises(RateLimited, match="key 'laptop' may send 6 requests a minute; the next in 10 s") as refused:
        budgets.begin(key, takes_slot=True)
    assert (refused.value.status, refused.value.retry_after_seconds) == (429, 10)
    assert refused.value.headers == {
        "x-ratelimit-limit-requests": "6", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s",
    }  # fmt: skip
    clock.now = 9.9
    with pytest.raises(RateLimited):
        budgets.begin(key, takes_slot=True)
    clock.now = 10.0
    _begun(budgets, key)


def test_requests_in_progress_are_limited_and_other_routes_do_not_count() -> None:
    budgets, key = KeyBudgets(_Clock()), _key(KeyLimits(concurrent_requests=2))
    first, _ = _begun(budgets, key), _begun(budgets, key)
    with pytest.raises(RateLimited, match=r"2 requests in progress \(concurrent_requests=2\)"):
        budgets.begin(key, takes_slot=True)
    assert budgets.begin(key, takes_slot=False) is not None
    first.settle(None, 0)
    _begun(budgets, key)


@pytest.mark.parametrize(
    ("limits", "period", "seconds"),
    [(KeyLimits(tokens_per_minute=600), "minute", 30), (KeyLimits(tokens_per_day=600), "day", 43_200)],
)
def test_tokens_are_reserved_then_charged_by_the_answer(limits: KeyLimits, period: str, seconds: int) -> None:
    budgets, key = KeyBudgets(_Clock()), _key(limits)
    first, second = _begun(budgets, key), _begun(budgets, key)
    first.reserve(300, 300)
    with pytest.raises(RateLimited, match=f"may use 600 tokens a {period}, and this request needs about 300") as error:
        second.reserve(200, 100)
    assert error.value.retry_after_seconds == seconds
    first.settle(100, 50)  # it took 150
    second.reserve(200, 100)
    with pytest.raises(RateLimited):
        _begun(budgets, key).reserve(151, 0)


def test_a_failed_request_gives_back_everything_and_an_aborted_one_pays_for_its_prompt() -> None:
    budgets, key = KeyBudgets(_Clock()), _key(KeyLimits(tokens_per_minute=100))
    failed = _begun(budgets, key)
    failed.reserve(60, 40)
    failed.settle(0, 0)
    aborted = _begun(budgets, key)
    aborted.reserve(60, 40)
    aborted.settle(None, 10)
    assert aborted.headers()["x-ratelimit-remaining-tokens"] == "30"


def test_a_request_that_is_larger_than_the_limit_needs_the_whole_limit() -> None:
    clock = _Clock()
    budgets, key = KeyBudgets(clock), _key(KeyLimits(tokens_per_minute=100))
    large = _begun(budgets, key)
    large.reserve(10_000, 0)
    large.settle(400, 0)
    with pytest.raises(RateLimited) as refused:
        _begun(budgets, key).reserve(1, 0)
    assert refused.value.retry_after_seconds == 181  # what it took too much is paid back first
    clock.now = 181.0
    _begun(budgets, key).reserve(1, 0)


def test_a_retry_reserves_nothing_more() -> None:
    budgets, key = KeyBudgets(_Clock()), _key(KeyLimits(tokens_per_minute=100))
    charge = _begun(budgets, key)
    charge.reserve(60, 0)
    charge.reserve(60, 0)
    assert charge.headers()["x-ratelimit-remaining-tokens"] == "40"


def test_keys_do_not_share_and_gone_ones_are_forgotten() -> None:
    budgets, limits = KeyBudgets(_Clock()), KeyLimits(requests_per_minute=1)
    _begun(budgets, _key(limits, "a"))
    _begun(budgets, _key(limits, "b"))
    budgets.forget_others({"b"})
    assert len(budgets) == 1
    _begun(budgets, _key(limits, "a"))
    with pytest.raises(RateLimited):
        budgets.begin(_key(limits, "b"), takes_slot=True)


def test_changed_limits_apply_at_once_and_what_is_unchanged_stays_used() -> None:
    budgets = KeyBudgets(_Clock())
    charge = _begun(budgets, _key(KeyLimits(requests_per_minute=2, tokens_per_minute=100)))
    charge.reserve(90, 0)
    changed = _begun(budgets, _key(KeyLimits(requests_per_minute=5, tokens_per_minute=100)))
    assert changed.headers()["x-ratelimit-remaining-requests"] == "4"
    assert changed.headers()["x-ratelimit-remaining-tokens"] == "10"


_STEP = st.tuples(st.floats(0, 20), st.integers(0, 300), st.integers(0, 300), st.booleans())


@given(st.integers(1, 50), st.integers(1, 1000), st.integers(1, 4), st.lists(_STEP, max_size=40))
def test_no_sequence_of_requests_gets_more_than_its_limits(
    per_minute: int, tokens: int, concurrent: int, steps: list[tuple[float, int, int, bool]]
) -> None:
    clock = _Clock()
    budgets = KeyBudgets(clock)
    key = _key(KeyLimits(per_minute, tokens, None, concurrent))
    running: list[tuple[Charge, int]] = []
    admitted = used = largest = 0
    for pause, estimate, _, ends in steps:
        clock.now += pause
        if ends and running:
            charge, reserved = running.pop(0)
            charge.settle(reserved, 0)  # the answer is as estimated
            used += reserved
        try:
            charge = _begun(budgets, key)
        except RateLimited as refused:
            assert refused.retry_after_seconds
            continue
        admitted += 1
        try:
            charge.reserve(estimate, 0)
            running.append((charge, estimate))
            largest = max(largest, estimate)
        except RateLimited:
            charge.settle(0, 0)
        assert len(running) <= concurrent
    filled = clock.now / 60.0
    assert admitted <= per_minute * (1 + filled) + 1e-6
    assert used <= tokens * (1 + filled) + largest + 1e-6  # one may be larger than the limit
