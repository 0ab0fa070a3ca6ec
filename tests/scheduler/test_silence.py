"""A replica whose runner hangs is loaded again, although each of its clients gives up early."""

from __future__ import annotations

import pytest

from router.domain.residency import ResidencyState
from tests.scheduler.play import Play, sized

SMALL = sized("small", 10)


@pytest.fixture
def one() -> Play:
    """A replica that has answered one request within a second."""
    play = Play(1).begin()
    ticket = play.arrive(SMALL)
    play.work_through()
    play.now += 1.0
    play.release(ticket)
    return play


def _give_up(play: Play, times: int, seconds: float = 30.0) -> None:
    """So many clients wait one after another, and each leaves without having seen a byte."""
    for _ in range(times):
        ticket = play.arrive(SMALL)
        play.advance(seconds)
        play.release(ticket, silent_seconds=seconds)


def test_silence_that_no_client_waits_out_adds_up(one: Play) -> None:
    _give_up(one, 3)
    assert one.state("gpu0", SMALL) is ResidencyState.READY
    _give_up(one, 1)
    assert one.state("gpu0", SMALL) is ResidencyState.UNLOADING
    assert next(iter(one.unloads.values())).reason == "its runner died or hangs"
    one.work_through()
    ticket = one.arrive(SMALL)
    one.work_through()
    one.release(ticket)
    _give_up(one, 3)
    assert one.state("gpu0", SMALL) is ResidencyState.READY


def test_a_response_ends_the_silence(one: Play) -> None:
    _give_up(one, 3)
    one.release(one.arrive(SMALL))
    _give_up(one, 3)
    assert one.state("gpu0", SMALL) is ResidencyState.READY


def test_the_same_silence_counts_once_for_two_clients(one: Play) -> None:
    for _ in range(3):
        both = [one.arrive(SMALL), one.arrive(SMALL)]
        one.advance(30.0)
        for ticket in both:
            one.release(ticket, silent_seconds=30.0)
    assert one.state("gpu0", SMALL) is ResidencyState.READY


def test_time_without_requests_is_no_silence(one: Play) -> None:
    for _ in range(10):
        one.advance(600.0)
        _give_up(one, 1, seconds=5.0)
    assert one.state("gpu0", SMALL) is ResidencyState.READY


def test_a_replica_that_has_answered_slowly_is_given_longer(one: Play) -> None:
    slow = one.arrive(SMALL)
    one.advance(200.0)
    one.release(slow)
    _give_up(one, 13)
    assert one.state("gpu0", SMALL) is ResidencyState.READY
    _give_up(one, 1)
    assert one.state("gpu0", SMALL) is ResidencyState.UNLOADING
