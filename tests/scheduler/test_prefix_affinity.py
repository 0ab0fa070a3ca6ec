"""What is recorded of served prompts, and its limits."""

from __future__ import annotations

from itertools import pairwise

from router.scheduler.balancing.prefix_affinity import LENGTHS, PrefixAffinity
from tests.scheduler.builders import model, residency, ticket

M, OTHER = model("m"), model("other")
ONE, TWO = residency("gpu0", M, 1000), residency("gpu1", M, 1000)


def test_lengths_grow_from_a_short_prompt_to_a_long_one_by_half_or_less() -> None:
    assert (LENGTHS[0], LENGTHS[-1], len(LENGTHS)) == (256, 65_536, 17)
    assert all(1.3 < after / before <= 1.5 for before, after in pairwise(LENGTHS))


def test_the_longest_beginning_that_each_replica_has_served_counts() -> None:
    prefix_affinity = PrefixAffinity()
    prints = tuple(range(5))
    prefix_affinity.chosen(ticket(1, M), ONE, prints[:2])
    prefix_affinity.chosen(ticket(2, M), TWO, prints[:4])
    prefix_affinity.chosen(ticket(3, M), TWO, (90, 91))
    assert prefix_affinity.holders(M.blob, prints) == {"gpu0": (0.0, 384 // 4), "gpu1": (0.0, 768 // 4)}
    assert prefix_affinity.holders(M.blob, (7, 8)) == {}
    assert prefix_affinity.holders(OTHER.blob, prints) == {}


def test_a_client_is_remembered_by_model() -> None:
    prefix_affinity = PrefixAffinity()
    prefix_affinity.chosen(ticket(1, M, client="ann"), ONE, ())
    assert prefix_affinity.last_of(ticket(2, M, client="ann")) == "gpu0"
    assert prefix_affinity.last_of(ticket(2, OTHER, client="ann")) is None
    assert prefix_affinity.last_of(ticket(2, M, client="ben")) is None
    prefix_affinity.chosen(ticket(3, M), ONE, ())
    assert prefix_affinity.last_of(ticket(4, M)) is None


def test_the_tables_are_bounded_and_keep_the_newest_entries() -> None:
    prefix_affinity = PrefixAffinity()
    for number in range(21_000):
        prefix_affinity.chosen(ticket(number, M, client=f"c{number}"), ONE, (number,))
        prefix_affinity.served(ticket(number, M, session=f"s{number}"), ONE)
        prefix_affinity.chosen(ticket(number, M, client="often"), TWO, (-1,))
    kept = sum(bool(prefix_affinity.holders(M.blob, (number,))) for number in range(21_000))
    assert kept == 19_999
    assert prefix_affinity.holders(M.blob, (-1,)) == {"gpu1": (0.0, 64)}
    assert prefix_affinity.holders(M.blob, (20_999,)) == {"gpu0": (0.0, 64)}
    assert prefix_affinity.last_of(ticket(1, M, client="often")) == "gpu1"
    assert prefix_affinity.last_of(ticket(1, M, client="c0")) is None
    assert prefix_affinity.turn_of(ticket(1, M, session="s0")) is None
    assert prefix_affinity.turn_of(ticket(1, M, session="s20999")) is not None
