"""A full queue sheds the lowest priority first, then the client with most in it; nobody gains by flooding."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.events import Arrived
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.scheduler.queue.wait_queue import WaitQueue
from tests.scheduler.builders import model, ticket
from tests.scheduler.play import Play, sized, with_policy

SMALL = sized("small", 10)
M = model("m")


def of(number: int, client: str, priority: int = 0) -> Ticket:
    return replace(ticket(number, M, client=client), priority=priority)


def queue_of(*tickets: Ticket) -> WaitQueue:
    queue = WaitQueue()
    for each in tickets:
        queue.add(each)
    return queue


def shed(queue: WaitQueue, newcomer: Ticket) -> int | None:
    found = queue.shed_for(newcomer)
    return None if found is None else found.id


def test_the_lowest_priority_gives_up_its_place_first() -> None:
    queue = queue_of(of(1, "a", 1), of(2, "b", -1), of(3, "c", -1), of(4, "c", -1), of(5, "d"))
    assert shed(queue, of(9, "e", 1)) == 4
    assert shed(queue, of(9, "e")) == 4
    assert shed(queue, of(9, "e", -1)) == 4
    assert shed(queue, of(9, "e", -2)) is None


def test_at_the_same_priority_the_client_with_most_gives_up_its_newest() -> None:
    queue = queue_of(*(of(number, "greedy") for number in range(1, 5)), of(5, "modest"))
    assert shed(queue, of(9, "modest")) == 4
    assert shed(queue, of(9, "new")) == 4
    assert shed(queue, of(9, "greedy")) is None


def test_equals_do_not_push_each_other_out() -> None:
    queue = queue_of(of(1, "a"), of(2, "a"), of(3, "b"), of(4, "b"))
    assert [shed(queue, of(9, client)) for client in ("a", "b")] == [None, None]
    assert shed(queue, of(9, "c")) in (2, 4)
    assert shed(queue_of(of(1, "a"), of(2, "b")), of(9, "c")) is None


_TICKETS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), max_size=20)


@given(_TICKETS, st.sampled_from("abcd"), st.integers(-1, 1), st.lists(st.integers(0, 19), max_size=10))
def test_what_is_shed_is_of_no_higher_priority_and_of_no_smaller_client(
    waiting: list[tuple[str, int]], client: str, priority: int, removed: list[int]
) -> None:
    queue = queue_of(*(of(number, *each) for number, each in enumerate(waiting)))
    for number in removed:
        queue.remove(TicketId(number))
    left, newcomer = list(queue.tickets.values()), of(99, client, priority)
    found = queue.shed_for(newcomer)
    lowest = min((each.priority for each in left), default=priority)
    counts = {name: sum(each.client == name and each.priority == lowest for each in left) for name in "abcd"}
    if found is None:
        assert lowest > priority or (lowest == priority and max(counts.values()) <= counts[client] + 1) or not left
        return
    assert found in left
    assert found.priority == lowest <= priority
    assert counts[found.client] == max(counts.values())
    assert found.id == max(each.id for each in left if each.client == found.client and each.priority == lowest)


def test_a_shed_request_is_told_when_to_come_back_and_the_newcomer_waits() -> None:
    play = Play(1, with_policy(Policy(vram_margin_bytes=0), queue_limit=3)).begin()
    greedy = [play.arrive(SMALL, client="greedy") for _ in range(3)]
    modest = play.arrive(SMALL, client="modest")
    refused = play.rejection(greedy[-1])
    assert (refused.code, bool(refused.retry_after_seconds)) == ("queue_full", True)
    assert "a client with fewer in it" in refused.message
    assert play.queued() == [*greedy[:2], modest]
    assert play.rejection(play.arrive(SMALL, client="greedy")).code == "queue_full"


def test_greedy_clients_are_those_above_the_average() -> None:
    assert queue_of(*(of(number, "a") for number in range(5))).greedy_clients() == frozenset()
    assert queue_of(of(1, "a"), of(2, "b")).greedy_clients() == frozenset()
    assert queue_of(of(1, "a"), of(2, "a"), of(3, "b")).greedy_clients() == {"a"}


def _arrive(play: Play, number: int, client: str, *, by_v1: bool) -> TicketId:
    """`by_v1`: its body cannot name a context, which makes it a group of its own for the same replica."""
    made = ticket(
        number, SMALL, client=client, prompt_tokens=50, arrived_at=play.now, deadline=play.now + 300.0, is_flexible=True
    )
    made = replace(made, takes_default_context=by_v1)
    play.waiting[made.id] = made
    play.post(Arrived(made))
    return made.id


@pytest.mark.parametrize("by_v1", [False, True])
def test_old_requests_of_a_flood_do_not_come_before_those_of_others(by_v1: bool) -> None:
    """Whether they ask in the same way as the others or in another, which makes them an older group."""
    play = Play(1, with_policy(Policy(vram_margin_bytes=0), queue_limit=100), slots=1).begin()
    running = _arrive(play, 1, "greedy", by_v1=by_v1)
    play.work_through()
    assert running in play.leases
    for number in range(2, 22):
        _arrive(play, number, "greedy", by_v1=by_v1)
    play.advance(250.0)  # their deadlines are close
    modest = [_arrive(play, number, "modest", by_v1=False) for number in (50, 51)]
    order: list[TicketId] = []
    for _ in range(4):
        (running,) = play.leases
        play.release(running)
        order += play.leases
    assert set(modest) <= set(order)  # in turn with the flood, as its equal
