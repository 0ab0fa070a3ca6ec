"""Reservations, evictions, drains and keep_alive."""

from __future__ import annotations

import math

import pytest

from router.domain.actions import UnloadCause
from router.domain.events import LoadedModel, Released, ResidencyRead
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.policy import Policy
from router.domain.request import TicketId
from router.domain.residency import ResidencyState
from router.scheduler.queue.fair_share import OUTPUT_WEIGHT
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized, with_policy

SMALL, OTHER, WHOLE, PAIR = sized("small", 10), sized("other", 10), sized("whole", 20), sized("pair", 40)
PLAIN = Policy(vram_margin_bytes=0)
GPU0 = GpuUuid("GPU-0")


@pytest.fixture
def one() -> Play:
    return Play(1).begin()


@pytest.fixture
def two() -> Play:
    return Play(2).begin()


def _idle(play: Play, of: object, **how: float) -> TicketId:
    """Loads a model and ends its request, so that it is idle."""
    ticket = play.arrive(of, **how)  # type: ignore[arg-type]
    play.work_through()
    play.release(ticket)
    return ticket


# --- reservations -----------------------------------------------------------------------------------------------


def test_a_reservation_covers_all_gpus_of_its_placement(two: Play) -> None:
    two.arrive(PAIR)
    (booked,) = two.snapshot().reservations.values()
    assert booked.per_gpu_bytes == (("GPU-0", 20), ("GPU-1", 20))
    two.arrive(SMALL)
    assert two.loads_sent == 1


def test_a_reservation_is_kept_until_the_gpus_were_read_after_the_load(one: Play) -> None:
    one.arrive(SMALL)
    (load,) = one.loads
    one.read_gpus(progress=0.5)
    assert list(one.snapshot().reservations) == [load]
    one.finish_load(load)
    one.read_gpus()  # began at the same time as the load ended, so it may not include the load
    assert list(one.snapshot().reservations) == [load]
    one.now += 0.1
    one.read_gpus()
    assert one.snapshot().reservations == {}


def test_a_failed_loads_reservation_is_gone_at_once(one: Play) -> None:
    one.arrive(SMALL)
    one.fail_load(next(iter(one.loads)))
    assert one.snapshot().reservations == {}


def test_a_waiting_model_is_not_sent_before_the_gpus_show_its_room(one: Play) -> None:
    _idle(one, WHOLE)
    one.arrive(SMALL)
    assert (list(one.unloads), one.loads) == ([key("gpu0", WHOLE)], {})
    assert one.state("gpu0", SMALL) is ResidencyState.PLANNED
    one.now += 1.0
    one.finish_unload(key("gpu0", WHOLE))
    assert one.loads == {}
    assert one.state("gpu0", WHOLE) is ResidencyState.UNLOADING
    one.now += 0.1
    one.read_gpus()
    assert [load.model for load in one.loads.values()] == [SMALL]
    assert one.residency("gpu0", WHOLE) is None


def test_a_load_is_planned_again_if_its_room_does_not_appear(one: Play) -> None:
    _idle(one, WHOLE)
    one.arrive(SMALL)
    (first,) = one.snapshot().reservations
    assert one.next_wake is not None
    one.advance(PLAIN.constants.room_timeout_seconds)
    (second,) = one.snapshot().reservations
    assert second != first
    assert one.state("gpu0", SMALL) is ResidencyState.PLANNED
    one.work_through()
    assert len(one.leases) == 1


def test_a_load_waits_if_another_program_takes_its_room(one: Play) -> None:
    _idle(one, WHOLE)
    ticket = one.arrive(SMALL)
    one.external[GPU0] = 4
    one.now += 0.1
    one.finish_unload(key("gpu0", WHOLE))
    one.external[GPU0] = 20
    one.now += 0.1
    one.read_gpus()
    assert one.loads == {}
    one.external[GPU0] = 0
    one.work_through()
    assert ticket in one.leases


# --- evictions and drains ---------------------------------------------------------------------------------------


def test_a_busy_model_is_not_evicted_and_leaves_when_it_is_idle(one: Play) -> None:
    running = one.arrive(WHOLE)
    one.work_through()
    waiting = one.arrive(SMALL)
    assert one.unloads == {}
    assert one.reason(waiting) == "gpu0: waits for 1 running requests of 1 models to make room"
    one.release(running)
    assert list(one.unloads) == [key("gpu0", WHOLE)]
    assert one.unload_causes == [UnloadCause.EVICTED]
    one.work_through()
    assert waiting in one.leases


def test_a_load_names_how_many_models_left_for_it_and_a_reload_is_none_of_them(one: Play) -> None:
    for small in (SMALL, OTHER):
        _idle(one, small)
    one.now += 60.0
    one.arrive(WHOLE)
    for unload in list(one.unloads):
        one.finish_unload(unload)
    one.now += 1.0
    one.read_gpus()
    (load,) = one.loads.values()
    assert (load.model, load.evicted) == (WHOLE, 2)


def test_the_fair_share_spread_is_that_of_the_waiting_clients(one: Play) -> None:
    one.arrive(SMALL, client="a")
    second = one.arrive(SMALL, client="b")
    one.work_through()
    assert len(one.leases) == 2
    for client in ("a", "a", "b"):
        one.arrive(SMALL, client=client)
    assert one.fair_share_spread() == 0.0
    del one.leases[second]
    one.post(Released(second, output_tokens=40))  # the free slot goes to the other client
    assert one.fair_share_spread() == OUTPUT_WEIGHT * 40
    for ticket in list(one.leases):
        one.release(ticket)
    assert one.fair_share_spread() == 0.0  # nobody waits


def test_an_unload_that_fails_is_sent_again_after_a_while_and_not_at_once(one: Play) -> None:
    _idle(one, WHOLE, keep_alive_seconds=0.0)
    one.finish_unload(key("gpu0", WHOLE), "connection refused")
    assert one.unloads == {}
    waiting = one.arrive(WHOLE)
    assert one.next_wake is not None
    one.advance(PLAIN.constants.room_timeout_seconds - 0.1)
    assert (one.unloads, waiting in one.waiting) == ({}, True)
    one.advance(0.1)
    assert one.unloads[key("gpu0", WHOLE)].reason == "an unload before this one failed"
    one.work_through()
    assert waiting in one.leases


def test_a_model_whose_unload_failed_is_forgotten_once_it_is_no_longer_listed(one: Play) -> None:
    _idle(one, SMALL, keep_alive_seconds=0.0)
    one.finish_unload(key("gpu0", SMALL), "404: model not found")
    one.post(ResidencyRead(InstanceName("gpu0"), (), one.now))
    assert one.state("gpu0", SMALL) is ResidencyState.UNLOADING
    one.lose_runner(key("gpu0", SMALL))
    assert one.residency("gpu0", SMALL) is None


def test_a_load_that_spilled_is_not_used_even_if_it_cannot_be_undone(one: Play) -> None:
    one.arrive(SMALL)
    one.finish_load(next(iter(one.loads)), on_cpu=1)
    one.finish_unload(key("gpu0", SMALL), "connection refused")
    one.advance(PLAIN.constants.failure_memory_seconds + 1.0)
    late = one.arrive(SMALL)
    assert late in one.waiting
    one.work_through()
    assert (late in one.leases, one.loads_sent) == (True, 2)


def test_a_stream_of_small_requests_cannot_starve_a_large_model(two: Play) -> None:
    """Before the drain the small model takes every request; after it they wait until the large one was served."""
    running = two.arrive(SMALL)
    two.work_through()
    large, began, served = two.arrive(PAIR), two.now, 0
    while large in two.waiting:
        two.now += 0.5
        following = two.arrive(SMALL)
        two.release(running)
        if following not in two.leases:
            break
        running, served = following, served + 1
    # the drain begins as the last of them arrives
    assert served == math.ceil(PLAIN.starving_after_seconds * PLAIN.constants.large_wait_share / 0.5) - 1
    two.work_through()
    assert (large in two.leases, following in two.waiting) == (True, True)
    assert two.now < began + PLAIN.starving_after_seconds * PLAIN.constants.large_wait_share + 1
    two.release(large)
    two.work_through()
    assert following in two.leases


def test_small_requests_continue_until_a_large_model_has_waited_long(two: Play) -> None:
    two.arrive(SMALL)
    two.work_through()
    two.arrive(PAIR)
    two.advance(PLAIN.constants.drain_after_seconds * PLAIN.constants.large_wait_share - 0.5)
    assert two.arrive(SMALL) in two.leases


def test_small_requests_continue_when_a_large_model_is_cancelled(two: Play) -> None:
    two.arrive(SMALL)
    two.work_through()
    large = two.arrive(PAIR)
    two.advance(PLAIN.starving_after_seconds + 0.1)
    waits = two.arrive(SMALL)
    assert waits in two.waiting
    two.cancel(large)
    assert waits in two.leases


# --- keep_alive -------------------------------------------------------------------------------------------------


def test_a_model_is_unloaded_when_its_keep_alive_after_the_last_request_has_passed(one: Play) -> None:
    _idle(one, SMALL, keep_alive_seconds=60.0)
    ended = one.now
    assert one.next_wake == ended + 60.0
    one.advance(59.9)
    assert one.unloads == {}
    again = one.arrive(SMALL)
    one.advance(10.0)
    one.release(again)
    assert one.next_wake == one.now + 60.0
    one.advance(59.9)
    assert one.unloads == {}
    one.advance(0.2)
    assert one.unloads[key("gpu0", SMALL)].reason == "its keep_alive ended"
    assert one.unload_causes == [UnloadCause.EXPIRED]


def test_keep_alive_0_unloads_once_the_last_request_has_ended(one: Play) -> None:
    first = one.arrive(SMALL, keep_alive_seconds=0.0)
    second = one.arrive(SMALL, keep_alive_seconds=0.0)
    one.work_through()
    one.release(first)
    assert one.unloads == {}
    one.release(second)
    assert list(one.unloads) == [key("gpu0", SMALL)]


def test_a_model_that_somebody_waits_for_is_not_unloaded_by_time() -> None:
    play = Play(1, PLAIN, slots=1).begin()
    first = play.arrive(SMALL, keep_alive_seconds=0.0)
    second = play.arrive(SMALL, keep_alive_seconds=0.0)
    play.work_through()
    play.release(first)
    assert play.unloads == {}
    assert second in play.leases


def test_the_newest_request_with_keep_alive_decides(one: Play) -> None:
    _idle(one, SMALL, keep_alive_seconds=60.0)
    one.release(one.arrive(SMALL))
    assert one.next_wake == one.now + 60.0
    one.release(one.arrive(SMALL, keep_alive_seconds=-1.0))
    assert one.next_wake is None
    one.release(one.arrive(SMALL))
    assert one.next_wake is None
    one.release(one.arrive(SMALL, keep_alive_seconds=5.0))
    assert one.next_wake == one.now + 5.0


def test_without_keep_alive_in_requests_the_setting_counts() -> None:
    play = Play(1, with_policy(PLAIN, keep_alive_seconds=300.0)).begin()
    _idle(play, SMALL)
    assert play.next_wake == play.now + 300.0


def test_a_model_whose_clients_left_during_its_load_expires() -> None:
    play = Play(1, with_policy(PLAIN, keep_alive_seconds=300.0)).begin()
    play.cancel(play.arrive(SMALL))
    play.finish_load(next(iter(play.loads)))
    assert play.next_wake == play.now + 300.0
    play.advance(300.0)
    assert list(play.unloads) == [key("gpu0", SMALL)]


def test_an_adopted_model_expires_like_any_other() -> None:
    play = Play(1, with_policy(PLAIN, keep_alive_seconds=300.0)).begin()
    play.post(ResidencyRead(InstanceName("gpu0"), (LoadedModel("small", "", 10, 10, None, SMALL),), play.now))
    assert play.next_wake == play.now + 300.0


def test_while_several_requests_use_a_model_the_longest_keep_alive_counts(one: Play) -> None:
    patient_one = one.arrive(SMALL, keep_alive_seconds=600.0)
    one.work_through()
    hasty = one.arrive(SMALL, keep_alive_seconds=0.0)
    one.release(patient_one)
    one.release(hasty)
    assert one.unloads == {}
    assert one.next_wake == one.now + 600.0


# --- unloads requested by clients -------------------------------------------------------------------------------


def test_an_idle_model_is_unloaded_at_once_when_a_client_asks(two: Play) -> None:
    _idle(two, SMALL)
    two.ask_unload(SMALL)
    assert two.unloads[key("gpu0", SMALL)].reason == "a client asked for it"
    assert two.unload_causes == [UnloadCause.REQUESTED]


def test_a_busy_model_is_unloaded_for_a_client_when_it_is_idle(one: Play) -> None:
    running = one.arrive(SMALL, keep_alive_seconds=600.0)
    one.work_through()
    one.ask_unload(SMALL)
    assert one.unloads == {}
    one.release(running)
    assert list(one.unloads) == [key("gpu0", SMALL)]


def test_an_unload_of_what_is_not_loaded_does_nothing(one: Play) -> None:
    assert one.ask_unload(OTHER) == []
