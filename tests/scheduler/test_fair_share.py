"""Which client is served next."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.scheduler.queue.fair_share import TokenCounters
from tests.scheduler.builders import model, ticket

M = model("m")


def _of(number: int, client: str, tokens: int = 0, arrived_at: float = 0.0, priority: int = 0):  # type: ignore[no-untyped-def]
    made = ticket(number, M, arrived_at=arrived_at)
    return replace(made, client=client, prompt_tokens=tokens, priority=priority)


def test_the_client_that_was_given_least_is_next() -> None:
    counters = TokenCounters()
    counters.granted(_of(1, "a", tokens=100))
    assert counters.next_of([_of(2, "a"), _of(3, "b")], 0.0).client == "b"
    counters.released("b", output_tokens=60)
    assert counters.given("b") == 120.0
    assert counters.next_of([_of(2, "a"), _of(3, "b")], 0.0).client == "a"


def test_equals_are_served_in_the_order_of_their_arrival() -> None:
    assert TokenCounters().next_of([_of(2, "b"), _of(1, "a")], 0.0).id == 1


def test_priority_goes_before_fairness_and_a_minute_of_waiting_is_a_step_of_it() -> None:
    counters = TokenCounters()
    counters.granted(_of(1, "a", tokens=1000))
    high, low = _of(2, "a", priority=1), _of(3, "b")
    assert counters.next_of([low, high], 0.0) is high
    assert counters.next_of([low, replace(high, arrived_at=60.0)], 60.0) is low


@pytest.mark.parametrize("priority", [0, 3])
def test_a_ticket_close_to_its_deadline_goes_first(priority: int) -> None:
    counters = TokenCounters()
    counters.granted(_of(1, "a", tokens=1_000_000))
    greedy = replace(_of(2, "a", arrived_at=0.0), deadline=300.0)
    modest = replace(_of(3, "b", arrived_at=200.0, priority=priority), deadline=500.0)
    assert counters.next_of([modest, greedy], 239.0) is modest
    assert counters.next_of([modest, greedy], 240.0) is greedy


def test_a_ticket_starves_that_waits_while_its_client_is_not_served_with_the_model() -> None:
    counters = TokenCounters()
    counters.granted(_of(1, "a", tokens=1_000_000))  # of another model
    greedy, modest = _of(2, "a", arrived_at=0.0), _of(3, "b", arrived_at=10.0)
    assert counters.next_of([greedy, modest], 74.0, starving_seconds=75.0) is modest
    assert counters.next_of([greedy, modest], 75.0, starving_seconds=75.0) is greedy
    assert counters.next_of([greedy, modest], 75.0) is modest
    high = replace(modest, priority=5)
    assert counters.next_of([greedy, high], 75.0, starving_seconds=75.0) is high


def test_a_client_that_is_served_with_the_model_does_not_starve() -> None:
    counters = TokenCounters()
    counters.granted(_of(1, "a", tokens=1_000_000))
    counters.served_before_others(_of(1, "a"), 50.0)
    flood, modest = [_of(2, "a"), _of(4, "a", arrived_at=65.0)], _of(3, "b", arrived_at=60.0)
    assert counters.next_of([flood[0], modest, flood[1]], 124.0, starving_seconds=75.0) is modest
    assert counters.next_of([flood[0], modest, flood[1]], 125.0, starving_seconds=75.0) is flood[0]
    assert counters.order_of([flood[0], modest, flood[1]], 125.0, 75.0) == [
        flood[0],
        modest,
        flood[1],
    ]  # one, then fairness again


def test_a_returning_client_gets_no_credit_for_idle_time() -> None:
    counters = TokenCounters()
    counters.released("a", 100)
    counters.released("b", 50)
    counters.arrived("c", {"a", "b"})
    assert counters.given("c") == 100.0
    counters.arrived("c", {"a", "b", "c"})
    assert counters.given("c") == 100.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500)), min_size=1, max_size=60))
def test_backlogged_clients_never_differ_by_more_than_one_request(
    served: list[tuple[str, int]],
) -> None:
    counters = TokenCounters()
    largest = max(tokens for _, tokens in served)
    waiting = [_of(number, client) for number, client in enumerate("abc")]
    for number, (_, tokens) in enumerate(served):
        chosen = counters.next_of(waiting, 0.0)
        counters.granted(_of(100 + number, chosen.client, tokens=tokens))
    given_to = [counters.given(client) for client in "abc"]
    assert max(given_to) - min(given_to) <= largest


_WAITING = st.builds(
    lambda client, priority, waited, prompt, most: (client, priority, waited, prompt, most),
    st.sampled_from("abcd"), st.integers(-1, 2), st.floats(0.0, 300.0), st.integers(0, 600),
    st.one_of(st.none(), st.integers(-1, 400)),
)  # fmt: skip


@given(
    st.lists(_WAITING, max_size=25),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 900)),
    st.dictionaries(st.sampled_from("abcd"), st.floats(700.0, 1000.0)),
)
def test_the_predicted_order_is_the_order_of_choices(
    waiting: list[tuple[str, int, float, int, int | None]], given_before: dict[str, int], served: dict[str, float]
) -> None:
    counters = TokenCounters()
    for client, at in served.items():
        counters.served_before_others(_of(0, client), at)
    for client, tokens in given_before.items():
        counters.granted(_of(0, client, tokens=tokens))
    tickets = [
        replace(
            _of(number, client, prompt, 1000.0 - waited, priority), output_tokens_max=most, deadline=1300.0 - waited
        )
        for number, (client, priority, waited, prompt, most) in enumerate(sorted(waiting, key=lambda each: -each[2]), 1)
    ]
    told, left, chosen = counters.order_of(tickets, 1000.0, 75.0), list(tickets), []
    while left:
        chosen.append(counters.next_of(left, 1000.0, 75.0))
        counters.served_before_others(chosen[-1], 1000.0)
        left.remove(chosen[-1])
        counters.granted(chosen[-1])
        most = chosen[-1].output_tokens_max
        counters.released(chosen[-1].client, 256 if most is None or most < 0 else min(most, 256))
    assert told == chosen
