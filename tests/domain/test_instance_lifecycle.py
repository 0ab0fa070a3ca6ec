"""The transitions of an instance and the waits between restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceState
from router.domain.instance_lifecycle import (
    TABLE,
    ImpossibleMove,
    RestartPolicy,
    Trigger,
    can_move,
    is_fatal,
    next_state,
    quick_deaths_after,
    state_diagram,
    wait_seconds,
)

S, T = InstanceState, Trigger


def _after(*triggers: Trigger, start: InstanceState = S.STOPPED) -> InstanceState:
    state = start
    for trigger in triggers:
        state = next_state(state, trigger)
    return state


def test_an_instance_starts_serves_drains_and_stops() -> None:
    assert _after(T.START) is S.STARTING
    assert _after(T.START, T.ANSWERED) is S.READY
    assert _after(T.START, T.ANSWERED, T.DRAIN) is S.DRAINING
    assert _after(T.START, T.ANSWERED, T.DRAIN, T.STOP) is S.STOPPING
    assert _after(T.START, T.ANSWERED, T.DRAIN, T.STOP, T.EXITED) is S.STOPPED


def test_a_failed_instance_is_started_again_and_a_given_up_one_on_demand() -> None:
    assert _after(T.START, T.ANSWERED, T.FAILED) is S.BACKOFF
    assert _after(T.START, T.FAILED, T.START) is S.STARTING
    assert _after(T.START, T.GAVE_UP) is S.FATAL
    assert _after(T.START, T.GAVE_UP, T.START) is S.STARTING


def test_every_state_can_be_reached_and_left() -> None:
    reached, todo = {S.STOPPED}, [S.STOPPED]
    while todo:
        state = todo.pop()
        fresh = {target for (source, _), target in TABLE.items() if source is state} - reached
        reached |= fresh
        todo += fresh
    assert reached == set(S)
    assert {source for source, _ in TABLE} == set(S)


def test_stopped_can_be_reached_from_every_state() -> None:
    for state in S:
        here, steps = state, 0
        while here is not S.STOPPED:
            here = next_state(here, T.EXITED if can_move(here, T.EXITED) else T.STOP)
            steps += 1
            assert steps <= 2, state


@given(st.sampled_from(S), st.sampled_from(T))
def test_a_transition_that_is_not_in_the_table_is_refused(state: InstanceState, trigger: Trigger) -> None:
    if (state, trigger) in TABLE:
        assert next_state(state, trigger) is TABLE[state, trigger]
    else:
        assert not can_move(state, trigger)
        with pytest.raises(ImpossibleMove, match=f"{state} cannot move by '{trigger}'"):
            next_state(state, trigger)


def test_waits_double_up_to_the_limit() -> None:
    policy = RestartPolicy(first_wait_seconds=1, factor=2, wait_limit_seconds=10)
    assert [wait_seconds(deaths, policy) for deaths in range(7)] == [1, 1, 2, 4, 8, 10, 10]


@given(st.integers(0, 10_000), st.floats(0, 0.99), st.floats(1, 50), st.floats(0, 100))
def test_waits_stay_within_the_limit_and_jitter_only_adds(
    deaths: int, jitter: float, factor: float, first: float
) -> None:
    policy = RestartPolicy(first_wait_seconds=first, factor=factor, wait_limit_seconds=100)
    plain = wait_seconds(deaths, policy)
    assert first <= plain <= 100
    assert plain <= wait_seconds(deaths, policy, jitter) <= plain * (1 + jitter)
    assert plain <= wait_seconds(deaths + 1, policy)


def test_only_quick_deaths_in_a_row_are_fatal() -> None:
    policy = RestartPolicy(quick_death_seconds=30, quick_deaths_max=3)
    deaths = 0
    for _ in range(2):
        deaths = quick_deaths_after(deaths, 29.9, policy)
    assert not is_fatal(deaths, policy)
    assert is_fatal(quick_deaths_after(deaths, 0, policy), policy)
    assert quick_deaths_after(deaths, 30, policy) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.5},
        {"first_wait_seconds": -1},
        {"first_wait_seconds": 2, "wait_limit_seconds": 1},
        {"quick_deaths_max": 0},
    ],
)
def test_an_invalid_policy_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RestartPolicy(**wrong)  # pyright: ignore[reportArgumentType] (a mapping of several types)


def test_the_diagram_has_an_arrow_for_every_transition() -> None:
    lines = state_diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> stopped"]
    assert set(lines[2:]) == {f"    {source} --> {target}: {trigger}" for (source, trigger), target in TABLE.items()}
    assert len(lines) == len(TABLE) + 2
