"""The queue keeps its order by groups; compared with a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.request import Layout, LayoutKind, RunnerOptions, Ticket, TicketId
from router.scheduler.queue.wait_queue import WaitQueue, group_of
from tests.scheduler.builders import model, ticket

A, B = model("a"), model("b")
LONG: RunnerOptions = (("num_ctx", 2048),)


def _ids(tickets: list[Ticket]) -> list[int]:
    return [found.id for found in tickets]


def test_groups_are_served_in_the_order_of_their_oldest_ticket() -> None:
    queue = WaitQueue()
    for waiting in (ticket(1, B), ticket(2, A), ticket(3, B), ticket(4, A, options=LONG)):
        queue.add(waiting)
    assert _ids(queue.heads()) == [1, 2, 4]
    assert _ids(queue.group(group_of(ticket(9, B)))) == [1, 3]
    queue.remove(TicketId(1))
    assert _ids(queue.heads()) == [2, 3, 4]


def test_the_same_weights_under_another_name_are_one_group_and_other_options_another() -> None:
    alias = model("alias", blob=A.blob)
    assert group_of(ticket(1, A)) == group_of(ticket(2, alias))
    assert group_of(ticket(1, A)) != group_of(ticket(2, A, options=LONG))
    assert group_of(ticket(1, A)) != group_of(ticket(2, A, is_flexible=True))
    assert group_of(ticket(1, A)) != group_of(ticket(2, A, layout=Layout(LayoutKind.SPREAD)))


def test_removing_an_unknown_ticket_does_nothing() -> None:
    queue = WaitQueue()
    queue.add(ticket(1, A))
    assert queue.remove(TicketId(2)) is None
    assert queue.remove(TicketId(1)) == ticket(1, A)
    assert queue.remove(TicketId(1)) is None
    assert len(queue.tickets) == 0
    assert queue.heads() == []
    assert queue.next_deadline() is None
    assert not queue.waits_for(A.blob)


def test_expired_tickets_are_listed_oldest_first() -> None:
    queue = WaitQueue()
    for number, deadline in ((1, 9.0), (2, 5.0), (3, 7.0)):
        queue.add(ticket(number, A, deadline=deadline))
    assert queue.next_deadline() == 5.0
    assert _ids(queue.expired(4.9)) == []
    assert _ids(queue.expired(7.0)) == [2, 3]
    assert _ids(queue.expired(100.0)) == [1, 2, 3]


MODELS = (A, B, model("c"))
STEPS = st.lists(
    st.tuples(st.sampled_from(MODELS), st.sampled_from(((), LONG)), st.integers(0, 20), st.floats(0, 50)), max_size=40
)


@given(STEPS)
def test_the_queue_behaves_like_a_plain_list(steps: list[tuple[object, RunnerOptions, int, float]]) -> None:
    queue, plain = WaitQueue(), list[Ticket]()
    for number, (of, options, leaver, deadline) in enumerate(steps, 1):
        coming = ticket(number, of, options=options, deadline=deadline)  # type: ignore[arg-type]
        queue.add(coming)
        plain.append(coming)
        gone = queue.remove(TicketId(leaver))
        assert (gone in plain) == (gone is not None)
        plain = [waiting for waiting in plain if waiting.id != leaver]
        assert list(queue.tickets.values()) == plain
        assert len(queue.tickets) == len(plain)
        assert (TicketId(leaver) in queue.tickets) is False
        heads = {group_of(waiting): waiting for waiting in reversed(plain)}
        assert queue.heads() == sorted(heads.values(), key=lambda t: t.id)
        for group in heads:
            assert queue.group(group) == [waiting for waiting in plain if group_of(waiting) == group]
        for found in MODELS:
            assert queue.waits_for(found.blob) == any(waiting.model is found for waiting in plain)
        assert queue.expired(deadline) == [waiting for waiting in plain if waiting.deadline <= deadline]
        assert queue.next_deadline() == min((waiting.deadline for waiting in plain), default=None)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_its_length_is_the_number_of_waiting_tickets(count: int) -> None:
    queue = WaitQueue()
    for number in range(count):
        queue.add(ticket(number, MODELS[number % 3]))
    assert len(queue.tickets) == count
