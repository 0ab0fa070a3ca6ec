"""Which slot a prompt gets in an emulated runner, and how much of it is evaluated there already."""

from __future__ import annotations

import pytest

from router.lab.emulator.prompt_cache import PromptCache, Slot, common_length

A, B, C = ("a" * 100, "b" * 100, "c" * 100)


def cache(slots: int, most: int) -> PromptCache:
    """Each character is a token."""
    return PromptCache([Slot() for _ in range(slots)], most, len)


def cached(prompts: PromptCache, prompt: str) -> int:
    """How much of it was there; afterwards the slot has it."""
    slot = prompts.take(prompt)
    common = common_length(slot.text, prompt)
    slot.text = prompt
    prompts.let_go(slot)
    return common


@pytest.mark.parametrize(("most", "again"), [(0, 0), (99, 0), (100, 100)])
def test_a_prompt_that_left_its_slot_comes_back_where_so_many_tokens_are_kept(most: int, again: int) -> None:
    prompts = cache(1, most)
    assert [cached(prompts, one) for one in (A, B, A)] == [0, 0, again]


def test_the_prompt_that_was_put_away_first_is_forgotten_first() -> None:
    prompts = cache(1, 250)
    for one in (A, B, C, "d" * 100):  # three are put away, and two are kept
        cached(prompts, one)
    assert [cached(prompts, one) for one in (A, C)] == [0, 100]


def test_what_comes_back_is_taken_out_and_not_doubled() -> None:
    prompts = cache(1, 250)
    assert [cached(prompts, one) for one in (A, B, A, B, A, B)] == [0, 0, 100, 100, 100, 100]


def test_a_session_that_goes_on_leaves_nothing_behind_and_is_put_away_once() -> None:
    prompts = cache(1, 210)
    for one in (A, A + "x", B, A + "xy", C):
        cached(prompts, one)
    assert [cached(prompts, one) for one in (B, A + "xyz")] == [100, 102]


def test_the_slot_with_most_in_common_is_taken_of_the_free_ones() -> None:
    prompts = cache(2, 0)
    one, other = prompts.take(A), prompts.take(B)
    one.text, other.text = A, B
    prompts.let_go(one)
    assert prompts.take(B + "b") is one
    prompts.let_go(other)
    assert prompts.take(B + "b") is other


@pytest.mark.parametrize(("most", "taken"), [(0, 0), (1000, 1)])
def test_of_slots_with_nothing_in_common_0_24_takes_the_first_and_llama_server_the_one_let_go_longest_ago(
    most: int, taken: int
) -> None:
    prompts = cache(2, most)
    first, second = prompts.take(A), prompts.take(B)
    first.text, second.text = A, B
    prompts.let_go(second)
    prompts.let_go(first)
    assert prompts.take(C) is prompts.slots[taken]


def test_little_in_common_is_no_reason_for_a_slot_of_llama_server() -> None:
    prompts = cache(2, 1000)
    first, second = prompts.take(A), prompts.take(B)
    first.text, second.text = A, B
    prompts.let_go(second)
    prompts.let_go(first)
    assert prompts.take("a" * 9 + "c" * 91) is second
