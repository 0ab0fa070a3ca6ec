"""Flexible requests, which a replica with other options can serve, and requests with a layout."""

from __future__ import annotations

import pytest

from router.domain.policy import Policy, SchedulerConstants
from router.domain.request import Layout, LayoutKind, RunnerOptions, TicketId
from tests.scheduler.builders import gpu_id
from tests.scheduler.play import Play, sized

SMALL = sized("small", 10, context_length=131_072)
SHORT: RunnerOptions = (("num_ctx", 2048),)
LONG: RunnerOptions = (("num_ctx", 32_768),)
SINGLE, SPREAD, GPU_1 = Layout(LayoutKind.SINGLE), Layout(LayoutKind.SPREAD), Layout(LayoutKind.GPU, gpu_id(1))


@pytest.fixture
def two() -> Play:
    return Play(2, Policy(vram_margin_bytes=0, constants=SchedulerConstants(replicas_max=1)), slots=1).begin()


def test_a_smaller_context_is_served_by_the_loaded_replica(two: Play) -> None:
    two.release(_served(two))
    second = two.arrive(SMALL, SHORT, is_flexible=True)
    assert two.grant(second).options == ()
    assert two.grant(second).context_length == 8192
    assert two.loads_sent == 1


def test_a_smaller_context_waits_for_the_loaded_replica_and_loads_no_other(two: Play) -> None:
    first = _served(two)
    second = two.arrive(SMALL, SHORT, is_flexible=True)
    assert two.reason(second) == "1 of 1 slots are in use on gpu0"
    two.advance(30.0)
    assert (two.loads, two.unloads) == ({}, {})
    two.release(first)
    assert second in two.leases


def test_a_larger_context_reloads_the_replica_and_a_smaller_one_then_does_not(two: Play) -> None:
    two.release(_served(two))
    larger = two.arrive(SMALL, LONG, is_flexible=True)
    two.work_through()
    assert two.grant(larger).context_length == 32_768
    two.release(larger)
    for options in ((), SHORT):
        again = two.arrive(SMALL, options, is_flexible=True)
        assert two.grant(again).context_length >= 8192
        two.release(again)
    assert two.loads_sent == 2


def test_the_default_context_is_not_served_by_a_replica_with_less(two: Play) -> None:
    short = two.arrive(SMALL, SHORT)
    two.work_through()
    ordinary = two.arrive(SMALL, is_flexible=True)
    two.work_through()
    assert (two.grant(short).context_length, two.grant(ordinary).context_length) == (2048, 8192)


def test_a_request_with_layout_spread_gets_several_gpus_even_if_one_is_enough(two: Play) -> None:
    _served(two)
    spread = two.arrive(SMALL, layout=SPREAD)
    two.work_through()
    assert two.grant(spread).instance == "spread"
    here = two.arrive(SMALL, layout=GPU_1)
    two.work_through()
    assert two.grant(here).instance == "gpu1"
    assert two.loads_sent == 3


def test_a_layout_that_is_impossible_is_refused_at_once() -> None:
    one = Play(1).begin()
    refused = one.rejection(one.arrive(SMALL, layout=SPREAD))
    assert refused.code == "layout_unavailable"


def test_a_request_with_a_layout_does_not_delay_those_without(two: Play) -> None:
    first = _served(two)
    insists = two.arrive(SMALL, layout=SPREAD)
    plain = two.arrive(SMALL)
    assert [load.instance for load in two.loads.values()] == ["spread"]
    two.release(first)
    assert (plain in two.leases, insists in two.waiting) == (True, True)
    two.work_through()
    assert two.grant(insists).instance == "spread"


def test_requests_with_and_without_a_layout_share_a_load(two: Play) -> None:
    tickets = [two.arrive(SMALL), two.arrive(SMALL, layout=SINGLE), two.arrive(SMALL, is_flexible=True)]
    two.work_through()
    assert two.loads_sent == 1
    for ticket in tickets:
        assert two.grant(ticket).instance == "gpu0"
        two.release(ticket)


def _served(play: Play) -> TicketId:
    ticket = play.arrive(SMALL)
    play.work_through()
    assert play.grant(ticket).instance == "gpu0"
    return ticket
