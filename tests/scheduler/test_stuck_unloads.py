"""Unloads that keep failing: the server is restarted, or its memory written off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.events import ResidencyRead
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.request import TicketId
from router.domain.residency import ResidencyKey, ResidencyState
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized

SMALL, WHOLE, PAIR = sized("small", 10), sized("whole", 20), sized("pair", 40)
GPU0 = InstanceName("gpu0")
RETRY = Policy().constants.room_timeout_seconds
DRAIN = Policy().constants.restart_drain_seconds


@pytest.fixture
def two() -> Play:
    return Play(2).begin()


def _load_idle(play: Play) -> ResidencyKey:
    ticket = play.arrive(SMALL)
    play.work_through()
    play.release(ticket)
    (found,) = play.snapshot().residencies
    return found


def _fail_unload(play: Play, stuck: ResidencyKey, times: int = 2) -> None:
    """The unload fails so many times, and each is sent again in between."""
    while stuck not in play.unloads:
        play.advance(1.0)  # until the wait is worth the eviction
    for attempt in range(times):
        if attempt:
            play.advance(RETRY)
        play.finish_unload(stuck, "Stopping...")


def test_a_server_that_fails_two_unloads_is_restarted_and_who_waits_is_served(two: Play) -> None:
    stuck = _load_idle(two)
    large = two.arrive(PAIR)
    _fail_unload(two, stuck, times=1)
    assert (two.restarting, two.notices) == ([], [])
    two.advance(RETRY)
    two.finish_unload(stuck, "Stopping...")
    assert two.restarting == [stuck[0]]
    assert [notice.event for notice in two.notices] == ["instance_draining"]
    two.work_through()
    two.advance(1.0)
    two.work_through()
    assert two.grant(large).instance == "spread"


def test_a_server_that_fails_unloads_takes_no_new_work_and_its_running_requests_may_end() -> None:
    one = Play(1).begin()
    running = one.arrive(SMALL)
    one.work_through()
    other = sized("other", 10)
    idle = one.arrive(other)
    one.work_through()
    one.release(idle)
    one.ask_unload(other)
    _fail_unload(one, key("gpu0", other))
    assert one.restarting == []
    assert one.snapshot().instances[GPU0].state is InstanceState.DRAINING
    assert "other cannot be unloaded: Stopping..." in one.snapshot().instances[GPU0].reason
    late = one.arrive(SMALL)
    assert late in one.waiting
    one.release(running)
    assert one.restarting == [GPU0]
    one.work_through()
    one.advance(1.0)
    one.work_through()
    assert one.grant(late).instance == GPU0


def test_requests_that_do_not_end_delay_the_restart_for_a_limited_time() -> None:
    one = Play(1).begin()
    one.arrive(SMALL)
    one.work_through()
    other = sized("other", 10)
    one.release(_served(one, other))
    one.ask_unload(other)
    _fail_unload(one, key("gpu0", other))
    assert one.next_wake == one.now + DRAIN
    one.advance(DRAIN - 0.1)
    assert one.restarting == []
    one.advance(0.1)
    assert one.restarting == [GPU0]
    one.advance(DRAIN)
    assert one.restarting == [GPU0]


def _served(play: Play, of: ModelFacts) -> TicketId:
    ticket = play.arrive(of)
    play.work_through()
    return ticket


def _attach(play: Play) -> None:
    play.specs = {name: replace(spec, attached=True) for name, spec in play.specs.items()}
    play.begin()


def test_what_an_attached_server_does_not_unload_counts_as_external_and_the_load_goes_elsewhere(two: Play) -> None:
    _attach(two)
    stuck = _load_idle(two)
    two.arrive(WHOLE)
    two.work_through()
    waiting = two.arrive(sized("second", 20))
    _fail_unload(two, stuck)
    assert two.restarting == []
    assert [notice.event for notice in two.notices] == ["vram_written_off"]
    written_off = two.snapshot().residencies[stuck]
    assert (written_off.state, written_off.per_gpu_bytes) == (ResidencyState.UNLOADING, ())
    assert waiting in two.waiting
    two.release(next(iter(two.leases)))
    two.advance(1.0)
    two.work_through()
    assert two.grant(waiting).instance != stuck[0]


def test_an_attached_server_that_lets_go_at_last_is_used_again(two: Play) -> None:
    _attach(two)
    stuck = _load_idle(two)
    two.ask_unload(SMALL)
    _fail_unload(two, stuck)
    two.held.pop(stuck)
    two.now += 0.1
    two.read_gpus()
    two.post(ResidencyRead(stuck[0], (), two.now))
    assert stuck not in two.snapshot().residencies
    large = two.arrive(PAIR)
    two.work_through()
    assert two.grant(large).instance == "spread"


def test_nobody_waits_for_a_model_that_only_a_stuck_attached_replica_has() -> None:
    one = Play(1).begin()
    _attach(one)
    stuck = _load_idle(one)
    one.ask_unload(SMALL)
    _fail_unload(one, stuck)
    one.advance(Policy().constants.settle_seconds)
    refused = one.rejection(one.arrive(SMALL))
    assert (refused.code, refused.retry_after_seconds is not None) == ("no_instance", True)
    assert GpuUuid("GPU-0") in one.external
