"""Replicas and instances that fail requests take no new one for a while, if others can serve them."""

from __future__ import annotations

import pytest

from router.domain.events import Cancelled
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceState
from router.domain.request import TicketId
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized

MODEL, OTHER, THIRD = sized("model", 20), sized("other", 4), sized("third", 4)
ERROR, LOST, BUSY = ReplyFailure.ERROR, ReplyFailure.LOST, ReplyFailure.OVERLOADED


def _two_replicas() -> Play:
    """As of a model whose queue was long enough for a second replica."""
    play = Play(2, slots=4).begin()
    tickets = [play.arrive(MODEL) for _ in range(4)]
    play.work_through()
    tickets += [play.arrive(MODEL) for _ in range(60)]
    for _ in range(30):
        play.advance(5.0)
        play.work_through(2)
        if play.residency("gpu0", MODEL) and play.residency("gpu1", MODEL):
            break
    for _ in range(40):
        for lease in sorted(play.leases):
            play.release(lease)
    assert not play.waiting
    assert play.residency("gpu0", MODEL) is not None
    assert play.residency("gpu1", MODEL) is not None
    return play


@pytest.fixture
def two() -> Play:
    return _two_replicas()


def _on(play: Play, name: str) -> TicketId:
    """A request that is served by this instance; what is granted elsewhere meanwhile ends well."""
    others: list[TicketId] = []
    for _ in range(16):
        ticket = play.arrive(MODEL)
        if play.grant(ticket).instance == name:
            for other in others:
                play.release(other)
            return ticket
        others.append(ticket)
    raise AssertionError(f"{name} is granted nothing")


def _served_by(play: Play, count: int = 6) -> set[str]:
    tickets = [play.arrive(MODEL) for _ in range(count)]
    found = {str(play.grant(ticket).instance) for ticket in tickets if ticket in play.leases}
    for ticket in tickets:
        if ticket in play.leases:
            play.release(ticket)
    return found


def _fail(play: Play, name: str, times: int, failure: ReplyFailure = ERROR) -> None:
    for _ in range(times):
        play.release(_on(play, name), failure=failure)


def _ejected(play: Play) -> list[object]:
    return [notice.fields["instance"] for notice in play.notices if notice.event == "ejected"]


def test_a_replica_that_fails_five_requests_in_a_row_gets_no_new_one(two: Play) -> None:
    _fail(two, "gpu0", 4)
    assert _ejected(two) == []
    _fail(two, "gpu0", 1)
    assert _ejected(two) == ["gpu0"]
    assert two.notices[-1].fields["cause"] == "error"
    assert _served_by(two, 3) == {"gpu1"}


def test_a_success_in_between_starts_the_count_anew(two: Play) -> None:
    _fail(two, "gpu0", 4)
    two.release(_on(two, "gpu0"))
    _fail(two, "gpu0", 1)
    assert _ejected(two) == []


def test_a_replica_that_fails_every_other_request_is_ejected_for_its_share(two: Play) -> None:
    for _ in range(8):
        _fail(two, "gpu0", 1)
        if _ejected(two):
            break
        two.release(_on(two, "gpu0"))
    assert _ejected(two) == ["gpu0"]
    assert "% of its requests" in str(two.notices[-1].fields["reason"])


def test_after_the_time_one_request_shows_whether_it_is_well_again(two: Play) -> None:
    _fail(two, "gpu0", 5)
    assert two.next_wake == two.now + 10.0
    two.advance(10.5)
    probe = _on(two, "gpu0")
    held = [two.arrive(MODEL) for _ in range(4)]
    assert {two.grant(ticket).instance for ticket in held} == {"gpu1"}
    two.release(probe)
    for ticket in held:
        two.release(ticket)
    assert _served_by(two) == {"gpu0", "gpu1"}


def test_a_probe_that_fails_ejects_for_twice_as_long(two: Play) -> None:
    _fail(two, "gpu0", 5)
    two.advance(10.5)
    _fail(two, "gpu0", 1)
    assert two.notices[-1].fields["seconds"] == 20.0
    two.advance(15.0)
    assert _served_by(two, 3) == {"gpu1"}
    two.advance(6.0)
    two.release(_on(two, "gpu0"))


def test_a_probe_whose_client_leaves_shows_nothing(two: Play) -> None:
    _fail(two, "gpu0", 5)
    two.advance(10.5)
    two.release(_on(two, "gpu0"), silent_seconds=6.0)
    assert len(_ejected(two)) == 1
    two.release(_on(two, "gpu0"))
    assert _served_by(two) == {"gpu0", "gpu1"}


def test_clients_that_leave_are_no_failures(two: Play) -> None:
    for _ in range(20):
        two.release(_on(two, "gpu0"), silent_seconds=5.0)
    assert _ejected(two) == []


def test_an_overloaded_replica_is_not_taken_for_an_idle_one(two: Play) -> None:
    two.release(_on(two, "gpu0"), failure=BUSY)
    assert _served_by(two, 4) == {"gpu1"}
    two.advance(1.1)
    assert _served_by(two) == {"gpu0", "gpu1"}
    assert _ejected(two) == []


def test_the_last_replica_of_a_model_is_never_ejected() -> None:
    one = Play(1, slots=4).begin()
    for _ in range(12):
        ticket = one.arrive(MODEL)
        one.work_through()
        one.release(ticket, failure=ERROR)
    ticket = one.arrive(MODEL)
    assert one.grant(ticket).instance == "gpu0"
    assert not _ejected(one)


def test_requests_that_fail_at_the_same_time_eject_once(two: Play) -> None:
    _fail(two, "gpu0", 3)
    for ticket in [_on(two, "gpu0") for _ in range(4)]:
        two.release(ticket, failure=ERROR)
    assert [notice.fields["seconds"] for notice in two.notices if notice.event == "ejected"] == [10.0]


def test_if_the_other_replica_goes_the_ejected_one_serves(two: Play) -> None:
    _fail(two, "gpu0", 5)
    two.change_instance("gpu1", InstanceState.BACKOFF)
    ticket = two.arrive(MODEL)
    assert two.grant(ticket).instance == "gpu0"


def test_nothing_is_loaded_on_an_instance_that_loses_request_after_request() -> None:
    two = Play(2, slots=2).begin()
    for _ in range(3):
        ticket = two.arrive(OTHER)
        two.work_through()
        assert two.grant(ticket).instance == "gpu0"
        two.release(ticket, failure=LOST)
    assert _ejected(two)[-1] == "gpu0"
    ticket = two.arrive(THIRD)
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


def test_a_server_that_is_started_again_begins_without_a_record() -> None:
    two = Play(2, slots=2).begin()
    for _ in range(3):
        ticket = two.arrive(OTHER)
        two.work_through()
        two.release(ticket, failure=LOST)
    assert two.snapshot().ejected == {"gpu0"}
    two.change_instance("gpu0", InstanceState.BACKOFF)
    two.change_instance("gpu0", InstanceState.READY)
    assert two.snapshot().ejected == frozenset()


def test_a_retry_prefers_another_replica(two: Play) -> None:
    for name, other in (("gpu0", "gpu1"), ("gpu1", "gpu0")):
        for _ in range(3):
            ticket = two.arrive(MODEL, avoid=name)
            assert two.grant(ticket).instance == other
            two.release(ticket)


def test_a_cancelled_ticket_of_an_ejected_replica_leaves_nothing_behind(two: Play) -> None:
    _fail(two, "gpu0", 5)
    busy = [two.arrive(MODEL) for _ in range(4)]
    waiting = two.arrive(MODEL)
    if waiting in two.waiting:
        two.waiting.pop(waiting)
        two.endings[waiting] = None
        two.post(Cancelled(waiting))
    for ticket in busy:
        two.release(ticket)
    assert two.residency("gpu0", MODEL) is not None
    assert key("gpu0", MODEL) in two.held
