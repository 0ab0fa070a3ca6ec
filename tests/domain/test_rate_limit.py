"""A bucket never gives more than its capacity and what has flowed in, and says exactly when there is enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.domain.rate_limit import full_after, level_at, seconds_until

_CAPACITY = st.integers(1, 10_000)
_FILL = st.sampled_from((60.0, 86_400.0))


@given(_CAPACITY, _FILL, st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 5000)), max_size=30))
def test_no_more_is_given_than_the_capacity_and_what_flows_in(
    capacity: int, fill_seconds: float, steps: list[tuple[float, float]]
) -> None:
    full_at, now, given_out = float("-inf"), 0.0, 0.0
    for pause, wanted in steps:
        now += pause
        amount = min(wanted, capacity)
        if not seconds_until(amount, full_at, capacity, fill_seconds, now):
            full_at = full_after(full_at, amount, fill_seconds / capacity, now)
            given_out += amount
        assert level_at(full_at, capacity, fill_seconds, now) >= -1e-3
    assert given_out <= capacity * (1 + now / fill_seconds) * (1 + 1e-6)


@given(_CAPACITY, _FILL, st.floats(0, 20_000), st.floats(0, 20_000))
def test_after_the_stated_seconds_there_is_enough_and_a_second_earlier_there_is_not(
    capacity: int, fill_seconds: float, taken: float, wanted: float
) -> None:
    full_at = full_after(float("-inf"), taken, fill_seconds / capacity, 0.0)
    amount = min(wanted, capacity)
    seconds = seconds_until(wanted, full_at, capacity, fill_seconds, 0.0)
    assert level_at(full_at, capacity, fill_seconds, seconds) >= amount - 1e-3
    assert not seconds_until(wanted, full_at, capacity, fill_seconds, float(seconds))
    if seconds > 1:
        assert level_at(full_at, capacity, fill_seconds, seconds - 1) < amount


@given(_CAPACITY, _FILL, st.floats(0, 1000), st.floats(0, 1000))
def test_what_is_given_back_can_be_taken_again_and_no_more(
    capacity: int, fill_seconds: float, taken: float, again: float
) -> None:
    full_at = full_after(float("-inf"), taken, fill_seconds / capacity, 0.0)
    full_at = full_after(full_at, -taken, fill_seconds / capacity, 0.0)
    assert abs(level_at(full_at, capacity, fill_seconds, 0.0) - capacity) < 1e-3
    full_at = full_after(full_at, -again, fill_seconds / capacity, 0.0)
    assert level_at(full_at, capacity, fill_seconds, 0.0) <= capacity
