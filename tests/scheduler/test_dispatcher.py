"""The dispatcher: shared loads, limited slots, errors of loads, evictions, no starvation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.actions import Unload
from router.domain.events import ShutdownBegan
from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceState
from router.domain.policy import Policy
from router.domain.request import RunnerOptions, TicketId
from router.domain.residency import ResidencyState, is_spill
from router.scheduler.placement.measured_footprints import RAISE_RATIO
from tests.scheduler.builders import key, model
from tests.scheduler.play import GPU_BYTES, Play, sized, with_policy

SMALL, OTHER, WHOLE, PAIR = sized("small", 10), sized("other", 10), sized("whole", 20), sized("pair", 40)
NEVER = sized("never", 100)
LONG: RunnerOptions = (("num_ctx", 2048),)
PLAIN = Policy(vram_margin_bytes=0)


@pytest.fixture
def one() -> Play:
    """One GPU of 24 bytes, two slots."""
    return Play(1).begin()


@pytest.fixture
def two() -> Play:
    return Play(2).begin()


def _only_load(play: Play) -> LoadId:
    (load,) = play.loads
    return load


# --- loads and slots --------------------------------------------------------------------------------------------


def test_two_requests_for_a_cold_model_cause_one_load_and_both_are_served(one: Play) -> None:
    first, second = one.arrive(SMALL), one.arrive(SMALL)
    assert one.loads_sent == 1
    assert one.endings == {}
    one.finish_load(_only_load(one))
    assert [one.grant(ticket).instance for ticket in (first, second)] == ["gpu0", "gpu0"]
    assert one.loads_sent == 1


def test_names_of_the_same_weights_share_one_load(one: Play) -> None:
    one.arrive(SMALL)
    one.arrive(sized("alias", 10, blob=SMALL.blob))
    one.work_through()
    assert one.loads_sent == 1
    assert len(one.leases) == 2


def test_a_loaded_model_is_granted_at_once_with_its_reason(one: Play) -> None:
    one.arrive(SMALL)
    one.work_through()
    again = one.arrive(SMALL)
    assert one.grant(again).url == "http://127.0.0.1/gpu0"
    assert "1 of 2 slots were in use" in one.grant(again).reason
    assert "GPU 0 needs" in one.grant(again).reason


def test_a_request_that_finds_all_slots_in_use_gets_the_first_free_one(one: Play) -> None:
    first = one.arrive(SMALL)
    one.work_through()
    one.arrive(SMALL)
    third, fourth = one.arrive(SMALL), one.arrive(SMALL)
    assert one.queued() == [third, fourth]
    assert one.reason(third) == "2 of 2 slots are in use on gpu0"
    one.release(first)
    assert third in one.leases
    assert one.queued() == [fourth]


def test_an_embedding_model_is_given_one_request_at_a_time(one: Play) -> None:
    embed = sized("embed", 2, is_embedding=True)
    one.arrive(embed)
    one.arrive(embed)
    one.work_through()
    assert len(one.leases) == 1
    assert len(one.queued()) == 1


def test_models_that_fit_together_are_loaded_at_the_same_time(two: Play) -> None:
    two.arrive(SMALL)
    two.arrive(OTHER)
    assert {(load.instance, load.model.name) for load in two.loads.values()} == {("gpu0", "small"), ("gpu1", "other")}


def test_a_request_with_other_runner_options_gets_a_runner_of_its_own(two: Play) -> None:
    two.arrive(SMALL)
    two.work_through()
    two.arrive(SMALL, LONG)
    two.work_through()
    assert [two.grant(ticket).instance for ticket in sorted(two.leases)] == ["gpu0", "gpu1"]


def test_a_runner_with_other_options_is_replaced_once_its_requests_have_ended(one: Play) -> None:
    first = one.arrive(SMALL)
    one.work_through()
    one.arrive(SMALL, LONG)
    assert not one.unloads
    one.release(first)
    assert list(one.unloads) == [key("gpu0", SMALL)]
    one.work_through()
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert (found.options, found.in_flight, one.loads_sent) == (LONG, 1, 2)


# --- endings ----------------------------------------------------------------------------------------------------


def test_a_cancelled_ticket_frees_its_place() -> None:
    play = Play(1, with_policy(PLAIN, queue_limit=1)).begin()
    first = play.arrive(SMALL)
    assert play.rejection(play.arrive(SMALL)).code == "queue_full"
    play.cancel(first)
    assert play.queued() == []
    second = play.arrive(SMALL)
    play.work_through()
    assert second in play.leases
    assert first not in play.leases
    assert play.loads_sent == 1


def test_a_full_queue_answers_503_with_a_retry_time() -> None:
    play = Play(1, with_policy(PLAIN, queue_limit=3), slots=1).begin()
    for _ in range(3):
        play.arrive(SMALL)
    refused = play.rejection(play.arrive(OTHER))
    assert (refused.code, refused.status) == ("queue_full", None)
    assert refused.message == "server busy: the queue is full (queue.limit=3)"
    assert refused.retry_after_seconds == 3


def test_a_full_queue_does_not_refuse_a_request_that_can_be_served_at_once() -> None:
    play = Play(2, with_policy(PLAIN, queue_limit=1)).begin()
    play.arrive(SMALL)
    play.work_through()
    play.arrive(OTHER)
    assert play.arrive(SMALL) in play.leases


def test_with_a_full_queue_no_request_overtakes_its_own_group() -> None:
    play = Play(1, with_policy(PLAIN, queue_limit=1), slots=1).begin()
    served = play.arrive(SMALL)
    play.work_through()
    waits = play.arrive(SMALL)
    assert play.rejection(play.arrive(SMALL)).code == "queue_full"
    play.release(served)
    assert waits in play.leases


def test_a_timeout_tells_what_the_request_waited_for(one: Play) -> None:
    late = one.arrive(SMALL, ttft_target_seconds=30.0)
    one.advance(29.9)
    assert one.queued() == [late]
    one.advance(0.1)
    refused = one.rejection(late)
    assert refused.code == "wait_timeout"
    assert "waited 30 s (queue.timeout_seconds) for model 'small': it is being loaded on gpu0" in refused.message
    assert refused.retry_after_seconds is not None


def test_the_dispatcher_wakes_for_the_next_deadline(one: Play) -> None:
    one.arrive(SMALL, ttft_target_seconds=0.5)
    assert one.next_wake == one.now + 0.5


def test_without_waiting_requests_and_expiries_there_is_no_wake(one: Play) -> None:
    assert one.next_wake is None
    one.arrive(SMALL)
    one.work_through()
    assert one.next_wake is None


def test_a_model_that_fits_nowhere_ends_all_its_requests_at_once(two: Play) -> None:
    tickets = [two.arrive(NEVER) for _ in range(2)]
    assert {two.rejection(ticket).code for ticket in tickets} == {"model_too_large"}
    assert two.queued() == []


def test_after_shutdown_began_new_requests_are_refused_and_running_ones_may_end(one: Play) -> None:
    running = one.arrive(SMALL)
    one.work_through()
    waiting = one.arrive(OTHER)
    one.post(ShutdownBegan())
    assert one.rejection(waiting).code == "shutting_down"
    assert one.rejection(one.arrive(SMALL)).code == "shutting_down"
    one.release(running)
    assert one.leases == {}


# --- loads that go wrong ----------------------------------------------------------------------------------------


def test_a_failed_load_ends_all_requests_that_waited_for_it_with_the_servers_error(one: Play) -> None:
    tickets = [one.arrive(SMALL), one.arrive(SMALL), one.arrive(SMALL, LONG)]
    one.fail_load(_only_load(one), 500, "cudaMalloc failed: out of memory")
    for ticket in tickets[:2]:
        refused = one.rejection(ticket)
        assert (refused.code, refused.status, refused.message) == (
            "load_failed", 500, "cudaMalloc failed: out of memory",
        )  # fmt: skip
    assert one.queued() == [tickets[2]]
    assert not one.snapshot().reservations or one.loads


def test_a_failed_load_is_tried_on_the_other_gpu_and_not_again_on_the_same(two: Play) -> None:
    ticket = two.arrive(SMALL)
    two.fail_load(_only_load(two))
    (load,) = two.loads.values()
    assert load.instance == "gpu1"
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


def test_a_failure_is_remembered_for_a_while_and_then_forgotten(one: Play) -> None:
    one.arrive(SMALL)
    one.fail_load(_only_load(one))
    assert one.rejection(one.arrive(SMALL)).code == "load_failed"
    assert one.loads == {}
    one.advance(PLAIN.constants.failure_memory_seconds)
    one.arrive(SMALL)
    assert len(one.loads) == 1


def test_a_load_that_spilled_to_the_cpu_is_undone_and_never_used(one: Play) -> None:
    ticket = one.arrive(SMALL)
    (unload,) = [action for action in one.finish_load(_only_load(one), on_cpu=1) if action in one.unloads.values()]
    assert isinstance(unload, Unload)
    assert unload.reason == "came out 10 % on the CPU on gpu0"
    assert one.leases == {}
    one.finish_unload(key("gpu0", SMALL))
    one.advance(0.1)
    one.read_gpus()
    assert ticket in one.waiting  # planned anew once before its client is told
    one.finish_load(_only_load(one), on_cpu=1)
    refused = one.rejection(ticket)
    assert (refused.code, refused.status) == ("load_failed", 502)
    assert refused.message == "model 'small' came out 10 % on the CPU on gpu0"
    assert one.leases == {}
    one.work_through()
    assert one.residency("gpu0", SMALL) is None


def test_a_load_that_spilled_once_is_sent_again_and_used(one: Play) -> None:
    ticket = one.arrive(SMALL)
    one.finish_load(_only_load(one), on_cpu=1)
    one.work_through()
    assert (one.grant(ticket).instance, one.loads_sent) == ("gpu0", 2)


@pytest.mark.parametrize(("missing", "spilled"), [(1, False), (15_000, False), (15_200, True), (30_303, True)])
def test_less_than_half_a_layer_on_the_cpu_is_rounding(missing: int, spilled: bool) -> None:
    """32 layers and the output: each is a 33rd of the weights."""
    assert is_spill(model("m", weights_bytes=1_000_000), 1_000_000, 1_000_000 - missing) == spilled
    assert not is_spill(model("m", weights_bytes=0), 1000, 995)


def test_nothing_in_vram_is_on_the_cpu_even_where_the_server_reports_no_size() -> None:
    """0.30 and later, where no GPU is found."""
    assert is_spill(model("m", weights_bytes=1_000_000), 0, 0)
    assert is_spill(model("m", weights_bytes=1_000_000), 1_000_000, 0)
    assert not is_spill(replace(model("m", weights_bytes=1_000_000), is_opaque=True), 0, 0)


def test_a_load_that_fails_for_memory_is_planned_once_more_with_more_room(one: Play) -> None:
    ticket = one.arrive(SMALL)
    first = _only_load(one)
    (reserved,) = one.snapshot().reservations.values()
    one.fail_load(first, message="out of memory", is_memory_short=True)
    one.advance(1.0)
    one.read_gpus()
    (again,) = one.snapshot().reservations.values()
    assert again.per_gpu_bytes[0][1] == int(reserved.per_gpu_bytes[0][1] * RAISE_RATIO)
    one.fail_load(_only_load(one), message="out of memory", is_memory_short=True)
    refused = one.rejection(ticket)
    assert (refused.code, refused.status, refused.message) == ("load_failed", 500, "out of memory")


def test_a_raised_estimate_is_forgotten_after_a_minute(one: Play) -> None:
    one.arrive(SMALL)
    (reserved,) = one.snapshot().reservations.values()
    one.fail_load(_only_load(one), message="out of memory", is_memory_short=True)
    one.cancel(TicketId(1))
    one.work_through()
    one.advance(PLAIN.constants.failure_memory_seconds + 1.0)
    one.ask_unload(SMALL)
    one.work_through()
    one.arrive(SMALL)
    (again,) = one.snapshot().reservations.values()
    assert again.per_gpu_bytes == reserved.per_gpu_bytes


def test_a_load_that_spilled_on_one_gpu_is_tried_on_the_other(two: Play) -> None:
    ticket = two.arrive(SMALL)
    two.finish_load(_only_load(two), on_cpu=1)
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


def test_a_load_without_gpus_is_meant_to_be_on_the_cpu() -> None:
    play = Play(0).begin()
    ticket = play.arrive(SMALL)
    play.finish_load(_only_load(play))
    assert play.grant(ticket).instance == "cpu"


def test_a_load_that_ends_after_its_instance_was_lost_changes_nothing(two: Play) -> None:
    ticket = two.arrive(SMALL)
    lost = dict(two.loads)
    two.change_instance("gpu0", InstanceState.BACKOFF, "died by signal 9")
    (load,) = two.loads.values()
    assert load.instance == "gpu1"
    two.loads.update(lost)
    two.finish_load(next(iter(lost)))
    assert ticket in two.waiting
    assert two.residency("gpu0", SMALL) is None
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


# --- losses -----------------------------------------------------------------------------------------------------


def test_what_a_lost_instance_held_is_forgotten_and_placed_anew(two: Play) -> None:
    running = two.arrive(SMALL)
    two.work_through()
    assert two.grant(running).instance == "gpu0"
    two.change_instance("gpu0", InstanceState.BACKOFF)
    assert two.residency("gpu0", SMALL) is None
    after = two.arrive(SMALL)
    two.work_through()
    assert two.grant(after).instance == "gpu1"


def test_a_model_is_not_called_too_large_while_the_gpus_still_show_what_a_lost_instance_held(one: Play) -> None:
    one.arrive(sized("large", 20))
    one.work_through()
    one.now += 10.0
    waiting = one.arrive(sized("other", 20))
    one.change_instance("gpu0", InstanceState.BACKOFF)
    assert waiting in one.waiting
    one.change_instance("gpu0", InstanceState.READY)
    one.work_through()
    assert one.grant(waiting).instance == "gpu0"


def test_a_slot_of_a_lost_replica_does_not_count_for_the_next_one(one: Play) -> None:
    old = one.arrive(SMALL)
    one.work_through()
    one.change_instance("gpu0", InstanceState.BACKOFF)
    one.change_instance("gpu0", InstanceState.READY)
    new = one.arrive(SMALL)
    one.work_through()
    assert new in one.leases
    one.release(old, runner_lost=True)
    found = one.residency("gpu0", SMALL)
    assert found is not None
    assert (found.state, found.in_flight) == (ResidencyState.READY, 1)


def test_a_draining_instance_finishes_and_takes_nothing_new(two: Play) -> None:
    running = two.arrive(SMALL)
    two.work_through()
    two.change_instance("gpu0", InstanceState.DRAINING)
    after = two.arrive(SMALL)
    two.work_through()
    assert two.grant(after).instance == "gpu1"
    two.release(running)
    assert running not in two.leases


def test_a_runner_that_died_under_a_request_is_unloaded_before_its_model_is_used_again(one: Play) -> None:
    lost = one.arrive(SMALL)
    one.work_through()
    (unload,) = one.release(lost, runner_lost=True)
    assert unload in one.unloads.values()
    again = one.arrive(SMALL)
    assert again in one.waiting
    one.work_through()
    assert again in one.leases
    assert one.loads_sent == 2


def test_gpus_are_never_given_more_than_they_have() -> None:
    """`Play` checks this at each load; here is one example."""
    play = Play(1).begin()
    play.arrive(WHOLE)
    play.arrive(SMALL)
    (load,) = play.loads.values()
    assert load.model == WHOLE
    assert play.free_bytes(GpuUuid("GPU-0")) == GPU_BYTES - 20
