"""Which slot an emulated runner chooses for a prompt, and how much of the prompt is cached there."""

from __future__ import annotations

import pytest

from router.lab.emulator.prompt_cache import PromptCache, Slot, common_prefix_length

A, B, C = ("a" * 100, "b" * 100, "c" * 100)


def cache(slots: int, max_saved_tokens: int) -> PromptCache:
    """A prompt cache in which each character is a token."""
    return PromptCache([Slot() for _ in range(slots)], max_saved_tokens, len)


def cached(prompts: PromptCache, prompt: str) -> int:
    """Uses the cache for a prompt; returns the cached length."""
    slot = prompts.acquire(prompt)
    common = common_prefix_length(slot.text, prompt)
    slot.text = prompt
    prompts.release(slot)
    return common


@pytest.mark.parametrize(("max_saved_tokens", "restored_length"), [(0, 0), (99, 0), (100, 100)])
def test_an_evicted_prompt_is_restored_if_the_token_limit_allows(max_saved_tokens: int, restored_length: int) -> None:
    prompts = cache(1, max_saved_tokens)
    assert [cached(prompts, prompt) for prompt in (A, B, A)] == [0, 0, restored_length]


def test_the_oldest_saved_prompt_is_dropped_first() -> None:
    prompts = cache(1, 250)
    for prompt in (A, B, C, "d" * 100):  # three are saved, and two are kept
        cached(prompts, prompt)
    assert [cached(prompts, prompt) for prompt in (A, C)] == [0, 100]


def test_a_restored_prompt_is_removed_from_the_saved_ones() -> None:
    prompts = cache(1, 250)
    assert [cached(prompts, prompt) for prompt in (A, B, A, B, A, B)] == [0, 0, 100, 100, 100, 100]


def test_a_growing_session_is_saved_once() -> None:
    prompts = cache(1, 210)
    for prompt in (A, A + "x", B, A + "xy", C):
        cached(prompts, prompt)
    assert [cached(prompts, prompt) for prompt in (B, A + "xyz")] == [100, 102]


def test_the_free_slot_with_the_longest_common_prefix_is_chosen() -> None:
    prompts = cache(2, 0)
    first, second = prompts.acquire(A), prompts.acquire(B)
    first.text, second.text = A, B
    prompts.release(first)
    assert prompts.acquire(B + "b") is first
    prompts.release(second)
    assert prompts.acquire(B + "b") is second


@pytest.mark.parametrize(("max_saved_tokens", "chosen_index"), [(0, 0), (1000, 1)])
def test_without_a_common_prefix_0_24_takes_the_first_slot_and_llama_server_the_least_recently_used(
    max_saved_tokens: int, chosen_index: int
) -> None:
    prompts = cache(2, max_saved_tokens)
    first, second = prompts.acquire(A), prompts.acquire(B)
    first.text, second.text = A, B
    prompts.release(second)
    prompts.release(first)
    assert prompts.acquire(C) is prompts.slots[chosen_index]


def test_llama_server_ignores_a_short_common_prefix() -> None:
    prompts = cache(2, 1000)
    first, second = prompts.acquire(A), prompts.acquire(B)
    first.text, second.text = A, B
    prompts.release(second)
    prompts.release(first)
    assert prompts.acquire("a" * 9 + "c" * 91) is second
