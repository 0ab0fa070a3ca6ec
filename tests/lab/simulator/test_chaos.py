"""A thousand small worlds in which everything goes wrong, and every rule is checked after everything that happens."""

from __future__ import annotations

import pytest

from router.lab.simulator.chaos import check, failure, replay_command

SEEDS_A_PART = 100


@pytest.mark.parametrize("part", range(10))
def test_every_rule_holds_in_a_hundred_small_worlds(part: int) -> None:
    first = part * SEEDS_A_PART + 1
    broken = [words for seed in range(first, first + SEEDS_A_PART) if (words := failure(seed)) is not None]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("seed", [2106, 5362, 6868, 8641, 9587])
def test_worlds_that_broke_a_rule_once_are_whole(seed: int) -> None:
    """A server of 0.33 that takes one GPU of two; another program's memory in a measurement; books that said less
    than a server did on all or one of its GPUs, so that nothing fitted; a program that took more than a GPU had."""
    assert failure(seed) is None


def test_the_same_seed_is_the_same_run_to_the_byte() -> None:
    for seed in range(1, 11):
        if failure(seed) is None:
            assert check(seed) == check(seed)


def test_a_broken_rule_is_told_with_the_command_that_replays_it() -> None:
    assert replay_command(7) == "python -m router.lab.simulator.chaos --first 7 --count 1"
