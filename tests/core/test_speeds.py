"""How fast copies are, guessed and learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.cards import Gpu, GpuUuid
from router.core.entities import ResidencyKey
from router.core.speeds import Pace, Speeds, follow, guessed
from tests.core.builders import LLAMA_70B, card, gpu_id, instance, key, model

M = model("m", 8000)
CARDS: dict[GpuUuid, Gpu] = {
    gpu_id(0): card(0, 1, clock_hertz=9_751_000_000),
    gpu_id(1): card(1, 1, clock_hertz=5_000_000_000),
}


def test_a_70b_over_two_3090_is_guessed_as_it_was_measured() -> None:
    """16.6 tokens/s, within a third, and 375 tokens/s of prompt, within a half."""
    pace = guessed(LLAMA_70B.weights_bytes, (936e9, 936e9))
    assert 1 / pace.step_seconds == pytest.approx(16.6, rel=0.33)
    assert 1 / pace.prompt_seconds == pytest.approx(375, rel=0.5)


@given(st.integers(0, 10**12), st.lists(st.floats(1e9, 1e13), max_size=4))
def test_any_guess_is_a_time_and_a_faster_card_is_not_slower(size: int, cards: list[float]) -> None:
    pace = guessed(size, cards)
    assert 0 < pace.prompt_seconds < pace.step_seconds
    assert guessed(size, [rate * 2 for rate in cards]).step_seconds <= pace.step_seconds


def test_what_is_not_known_of_a_card_is_taken_as_the_usual() -> None:
    assert guessed(10**10, (None,)) == guessed(10**10, (5e11,))
    assert guessed(10**10, ()).step_seconds > guessed(10**10, (None,)).step_seconds  # the CPU


@given(st.floats(0.05, 20.0))
def test_what_requests_show_is_followed_wherever_it_lies(truth: float) -> None:
    factor = 1.0
    for _ in range(80):
        factor = follow(factor, expected_seconds=factor, shown_seconds=truth)
    assert factor == pytest.approx(truth, rel=0.01)


@given(st.floats(0.02, 50.0), st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_one_odd_request_changes_little(factor: float, expected: float, shown: float) -> None:
    assert 0.8 * factor <= follow(factor, expected, shown) <= 1.61 * factor or factor >= 50.0 / 1.61


def _taught(speeds: Speeds, where: ResidencyKey, expected: float, shown: float) -> None:
    for _ in range(3):
        speeds.prompt_took(where, expected, shown)
        speeds.steps_took(where, expected, shown / 2)


def test_a_copy_that_has_shown_nothing_is_judged_by_its_card_and_by_the_other_copies() -> None:
    speeds = Speeds()
    fast, slow = instance("gpu0", 0), instance("gpu1", 1)
    before = [speeds.pace(spec, M, CARDS) for spec in (fast, slow)]
    assert before[0].step_seconds < before[1].step_seconds
    _taught(speeds, key("gpu0", M), 1.0, 3.0)
    after = [speeds.pace(spec, M, CARDS) for spec in (fast, slow)]
    for old, new in zip(before, after, strict=True):
        assert new.prompt_seconds / old.prompt_seconds == pytest.approx(
            after[0].prompt_seconds / before[0].prompt_seconds
        )
        assert new.prompt_seconds > old.prompt_seconds
        assert new.step_seconds > old.step_seconds
    assert speeds.pace(fast, model("other", 8000), CARDS) == before[0]


def test_each_copy_keeps_what_it_has_shown_itself() -> None:
    speeds = Speeds()
    _taught(speeds, key("gpu0", M), 1.0, 2.0)
    _taught(speeds, key("gpu1", M), 1.0, 0.5)
    fast, slow = (speeds.pace(instance(name, number), M, CARDS) for name, number in (("gpu1", 0), ("gpu0", 0)))
    assert fast.prompt_seconds < slow.prompt_seconds


def test_a_guess_made_before_the_cards_were_read_is_not_kept() -> None:
    speeds = Speeds()
    blind = speeds.pace(instance("gpu0", 0), M, {})
    assert speeds.pace(instance("gpu0", 0), M, CARDS) != blind
    assert isinstance(blind, Pace)


def test_what_is_remembered_has_a_bound() -> None:
    speeds = Speeds()
    for number in range(1200):
        speeds.prompt_took(key("gpu0", model(f"m{number}")), 1.0, 2.0)
    first, last = (speeds.pace(instance("gpu0", 0), model(f"m{n}", 8000), CARDS) for n in (0, 1199))
    assert first.prompt_seconds < last.prompt_seconds
