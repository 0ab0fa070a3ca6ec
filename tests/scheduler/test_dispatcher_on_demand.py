"""Instances on demand, and pins."""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Reject
from router.domain.events import FootprintsLoaded, ModelDiscovered, UnloadRequested
from router.domain.footprint import MeasuredFootprint
from router.domain.instance import InstanceName, InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy
from router.domain.request import TicketId
from tests.scheduler.builders import gpu_id, instance, key
from tests.scheduler.play import GPU_BYTES, Play, sized

SMALL, OTHER, HALF, PAIR = sized("small", 10), sized("other", 6), sized("half", 12), sized("pair", 40)
POLICY = Policy(
    vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=2), instance_idle_seconds=30.0
)


def _play(gpus: int, policy: Policy = POLICY) -> Play:
    return Play(gpus, policy).begin()


def _run(play: Play, of: ModelFacts, **how: object) -> TicketId:
    """Serves one request; starts its instance if necessary."""
    ticket = play.arrive(of, **how)  # type: ignore[arg-type]
    play.bring_up()
    play.work_through()
    play.bring_up()
    play.work_through()
    return ticket


def test_a_large_model_gets_the_smallest_set_of_gpus_and_an_instance_for_it() -> None:
    four = _play(4)
    ticket = _run(four, PAIR)
    assert four.grant(ticket).instance == "gpu0+gpu1"
    assert four.specs[InstanceName("gpu0+gpu1")].gpus == (gpu_id(0), gpu_id(1))


def test_a_second_model_on_a_gpu_gets_a_server_of_its_own() -> None:
    one = _play(1)
    first, second = _run(one, SMALL), _run(one, OTHER)
    assert (one.grant(first).instance, one.grant(second).instance) == ("gpu0", "gpu0.2")


def test_a_load_that_spilled_is_planned_anew_with_a_slot_less() -> None:
    one = _play(1)
    ticket = one.arrive(SMALL)
    one.finish_load(next(iter(one.loads)), on_cpu=1)
    assert one.specs[InstanceName("gpu0.2")].num_parallel == 1
    one.bring_up()
    one.work_through()
    assert one.grant(ticket).instance == "gpu0.2"


def test_a_load_that_spilled_twice_is_refused() -> None:
    one = _play(1)
    ticket = one.arrive(SMALL)
    for _ in range(2):
        one.finish_load(next(iter(one.loads)), on_cpu=1)
        one.bring_up()
        one.finish_unload(next(iter(one.unloads)))
        one.advance(0.1)
        one.read_gpus()
    assert (one.rejection(ticket).status, one.loads_sent) == (502, 2)


def test_an_instance_that_stays_empty_is_stopped_once() -> None:
    one = _play(1, replace(POLICY, instance_idle_seconds=1000.0))
    one.release(_run(one, SMALL))
    one.release(_run(one, OTHER, keep_alive_seconds=0.0))
    one.work_through()
    one.advance(1.0)
    one.advance(500.0)
    assert one.stopped == []
    one.advance(1000.0)
    one.advance(5.0)
    assert one.stopped == ["gpu0.2"]
    one.change_instance("gpu0.2", InstanceState.STOPPED)
    assert InstanceName("gpu0.2") not in one.snapshot().instances
    assert InstanceName("gpu0") in one.snapshot().instances


def test_an_instance_that_does_not_start_is_stopped_and_another_set_is_tried() -> None:
    four = _play(4)
    ticket = four.arrive(PAIR)
    (failing,) = four.starting
    four.starting.clear()
    four.change_instance(failing, InstanceState.BACKOFF, "ended with exit code 1")
    four.advance(1.0)
    assert four.stopped == [failing]
    four.change_instance(failing, InstanceState.STOPPED)
    four.bring_up()
    four.work_through()
    assert four.specs[four.grant(ticket).instance].gpus != four.specs[failing].gpus


def test_a_model_that_fits_on_no_set_is_refused_with_the_bytes_and_nothing_is_started() -> None:
    two = _play(2)
    refused = two.endings[two.arrive(sized("huge", 2 * GPU_BYTES + 2))]
    assert isinstance(refused, Reject)
    assert (refused.code, two.starting) == ("model_too_large", [])
    assert "gpu0: GPU 0 needs " in refused.message


def test_a_pinned_model_goes_to_its_gpus_and_no_other() -> None:
    pins = {"small": Pin(gpus=(gpu_id(2),)), "other": Pin(gpus=(gpu_id(0), gpu_id(3)))}
    four = _play(4, replace(POLICY, pins=pins))
    assert four.grant(_run(four, SMALL)).instance == "gpu2"
    spread = four.grant(_run(four, OTHER)).instance
    assert four.specs[spread].gpus == (gpu_id(0), gpu_id(3))


def test_a_keep_warm_model_is_loaded_at_start_and_after_a_loss_and_never_evicted() -> None:
    one = _play(1, replace(POLICY, pins={"half": Pin(keep_warm=True)}))
    one.post(ModelDiscovered(HALF))
    one.work_through()
    assert one.state("gpu0", HALF) is not None
    one.advance(POLICY.constants.settle_seconds + 1.0)
    refused = one.endings[one.arrive(sized("whole", 20))]
    assert isinstance(refused, Reject)
    assert refused.code == "model_too_large"
    one.change_instance("gpu0", InstanceState.BACKOFF)
    one.change_instance("gpu0", InstanceState.READY)
    one.advance(1.0)
    assert [load.model for load in one.loads.values()] == [HALF]


def test_an_exclusive_gpu_takes_only_its_models() -> None:
    two = _play(2, replace(POLICY, exclusive_gpus={gpu_id(0): frozenset({"other"})}))
    assert two.grant(_run(two, SMALL)).instance == "gpu1"
    assert two.grant(_run(two, HALF)).instance == "gpu1.2"
    assert two.grant(_run(two, OTHER)).instance == "gpu0"


def test_a_pin_with_slots_gets_its_own_instance() -> None:
    one = _play(1, replace(POLICY, pins={"small": Pin(num_parallel=5)}))
    ticket = _run(one, SMALL)
    assert one.specs[one.grant(ticket).instance].num_parallel == 5
    found = one.residency(one.grant(ticket).instance, SMALL)
    assert found is not None
    assert found.slots == 5


def test_a_measured_footprint_replaces_the_estimate_and_is_stored() -> None:
    one = _play(1)
    one.release(_run(one, SMALL))
    ((shown, sizes),) = one.remembered.items()
    assert (shown.blob, shown.gpus, sizes) == (SMALL.blob, 1, (10,))
    again = _play(1)
    again.post(FootprintsLoaded((MeasuredFootprint(shown, (11,)),)))
    again.arrive(SMALL)
    (booked,) = again.snapshot().reservations.values()
    assert booked.per_gpu_bytes == ((gpu_id(0), 11),)


def test_requests_that_would_wait_longer_than_a_load_get_another_replica() -> None:
    two = _play(2)
    tickets = [two.arrive(SMALL) for _ in range(4)]
    two.work_through()
    two.bring_up()
    two.work_through()
    assert sorted(two.grant(ticket).instance for ticket in tickets) == ["gpu0", "gpu0", "gpu1", "gpu1"]


def test_a_model_that_a_client_unloaded_is_not_loaded_again_without_a_request() -> None:
    one = _play(1)
    for _ in range(20):
        one.release(_run(one, SMALL))
    one.post(UnloadRequested(SMALL.blob))
    one.work_through()
    for _ in range(5):
        one.advance(1.0)
    assert (one.loads, one.residency("gpu0", SMALL)) == ({}, None)


def test_a_pin_overrides_keep_alive_of_clients_but_not_a_delete() -> None:
    one = _play(1, replace(POLICY, pins={"small": Pin(keep_warm=True)}))
    one.release(_run(one, SMALL, keep_alive_seconds=0.0))
    one.post(UnloadRequested(SMALL.blob))
    one.advance(60.0)
    assert (one.unloads, one.state("gpu0", SMALL) is not None) == ({}, True)
    one.post(UnloadRequested(SMALL.blob, even_pinned=True))
    assert list(one.unloads) == [key("gpu0", SMALL)]
