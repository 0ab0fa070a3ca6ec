"""What an operator drains takes no new request, finishes what runs, and is empty then; a resume undoes it."""

from __future__ import annotations

from dataclasses import replace

from router.domain.events import ModelDiscovered
from router.domain.instance import InstanceName, InstanceState
from router.domain.policy import Pin, Policy
from router.domain.residency import ResidencyState
from tests.scheduler.builders import gpu_id, instance, key
from tests.scheduler.play import Play, sized

SMALL, OTHER, WHOLE, PAIR = sized("small", 10), sized("other", 10), sized("whole", 20), sized("pair", 40)
ON_DEMAND = Policy(
    vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=2), instance_idle_seconds=30.0
)


def _states(play: Play) -> dict[str, str]:
    return {name: view.state.value for name, view in play.snapshot().instances.items()}


def _two() -> Play:
    return Play(2).begin()


def test_a_drained_gpu_takes_no_new_request_and_says_why() -> None:
    two = _two()
    two.drain(gpu=0)
    assert _states(two) == {"gpu0": "draining", "gpu1": "ready", "spread": "draining"}
    assert two.snapshot().instances[InstanceName("spread")].reason == "GPU 0 is drained"
    tickets = [two.arrive(WHOLE), two.arrive(WHOLE)]
    two.work_through()
    assert [two.grant(ticket).instance for ticket in tickets] == ["gpu1", "gpu1"]


def test_what_runs_on_a_drained_gpu_finishes_and_its_model_is_unloaded_then() -> None:
    two = _two()
    ticket = two.arrive(WHOLE)
    two.work_through()
    assert two.grant(ticket).instance == "gpu0"
    two.drain(gpu=0)
    assert not two.unloads
    two.release(ticket)
    assert list(two.unloads) == [key("gpu0", WHOLE)]
    assert two.unloads[key("gpu0", WHOLE)].reason == "GPU 0 is drained"
    two.work_through()
    assert two.free_bytes(gpu_id(0)) == 24


def test_a_load_that_waits_for_a_drained_gpu_is_planned_elsewhere() -> None:
    two = _two()
    busy = two.arrive(WHOLE)
    two.work_through()
    waiting = two.arrive(PAIR)
    two.drain(gpu=1)
    assert two.rejection(waiting).code == "no_instance"
    assert "GPU 1 is drained" in two.rejection(waiting).message
    assert two.rejection(waiting).retry_after_seconds is not None
    two.release(busy)


def test_a_request_that_waits_meanwhile_is_told_what_is_drained() -> None:
    two = Play(2, slots=1).begin()
    two.drain(gpu=1)
    two.arrive(WHOLE)
    two.work_through()
    waiting = two.arrive(OTHER)
    assert "GPU 1 is drained" in two.reason(waiting)


def test_an_instance_is_drained_by_its_name() -> None:
    two = _two()
    two.drain(instance="gpu0")
    assert _states(two) == {"gpu0": "draining", "gpu1": "ready", "spread": "ready"}
    ticket = two.arrive(WHOLE)
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"


def test_when_everything_is_drained_requests_are_refused_with_the_reason() -> None:
    two = _two()
    two.drain()
    refused = two.rejection(two.arrive(SMALL))
    assert refused.code == "no_instance"
    assert "gpu0 is draining (drained by an operator)" in refused.message
    assert refused.retry_after_seconds is not None
    two.drain(resume=True)
    assert set(_states(two).values()) == {"ready"}
    ticket = two.arrive(SMALL)
    two.work_through()
    assert two.grant(ticket).instance == "gpu0"


def test_resuming_one_of_two_drained_gpus_keeps_what_is_over_the_other() -> None:
    two = _two()
    two.drain(gpu=0)
    two.drain(gpu=1)
    two.drain(gpu=0, resume=True)
    assert _states(two) == {"gpu0": "ready", "gpu1": "draining", "spread": "draining"}


def test_a_server_that_restarts_on_a_drained_gpu_stays_out_of_service() -> None:
    two = _two()
    two.drain(gpu=0)
    two.change_instance("gpu0", InstanceState.BACKOFF)
    two.change_instance("gpu0", InstanceState.READY)
    assert _states(two)["gpu0"] == "draining"


def test_a_gpu_that_was_lost_meanwhile_is_still_lost_after_the_resume() -> None:
    two = _two()
    two.drain(gpu=0)
    two.lost.add(gpu_id(0))
    two.read_gpus()
    two.drain(gpu=0, resume=True)
    assert _states(two)["gpu0"] == "draining"
    assert two.snapshot().instances[InstanceName("gpu0")].reason == "GPU 0 is lost: GPU is lost"
    two.lost.clear()
    two.now += 1.0
    two.read_gpus()
    assert _states(two)["gpu0"] == "ready"


def test_a_warm_model_is_loaded_elsewhere_before_its_requests_ask_for_it() -> None:
    two = Play(2, replace(Policy(vram_margin_bytes=0), pins={"small": Pin(keep_warm=True)})).begin()
    two.post(ModelDiscovered(SMALL))
    two.work_through()
    assert two.state("gpu0", SMALL) is ResidencyState.READY
    two.drain(gpu=0)
    two.work_through()
    assert (two.state("gpu0", SMALL), two.state("gpu1", SMALL)) == (None, ResidencyState.READY)
    assert not two.snapshot().warm_missing


def test_a_warm_model_that_may_run_nowhere_else_is_reported_missing() -> None:
    policy = replace(Policy(vram_margin_bytes=0), pins={"small": Pin(gpus=(gpu_id(0),), keep_warm=True)})
    two = Play(2, policy).begin()
    two.post(ModelDiscovered(SMALL))
    two.work_through()
    two.drain(gpu=0)
    two.work_through()
    two.advance(5.0)
    assert "GPU 0 is drained" in two.snapshot().warm_missing["small"]


def test_instances_that_were_started_on_demand_are_stopped_when_they_are_empty() -> None:
    two = Play(2, ON_DEMAND).begin()
    first = two.arrive(SMALL)
    two.work_through()
    second = two.arrive(OTHER, layout=None)
    two.bring_up()
    two.work_through()
    third = two.arrive(sized("third", 5))
    two.bring_up()
    two.work_through()
    assert two.grant(third).instance == "gpu0.2"
    two.drain(gpu=0)
    assert two.stopped == []
    for ticket in (first, second, third):
        two.release(ticket)
    two.work_through()
    assert two.stopped == ["gpu0.2"]


def test_nothing_is_started_on_a_drained_gpu() -> None:
    three = Play(3, ON_DEMAND).begin()
    three.drain(gpu=0)
    ticket = three.arrive(PAIR)
    three.bring_up()
    three.work_through()
    assert three.grant(ticket).instance == "gpu1+gpu2"


def test_a_drained_server_that_cannot_unload_is_restarted() -> None:
    two = _two()
    ticket = two.arrive(WHOLE)
    two.work_through()
    two.release(ticket)
    two.drain(gpu=0)
    for _ in range(2):
        two.finish_unload(key("gpu0", WHOLE), "500")
        two.advance(20.0)
    assert two.restarting == ["gpu0"]
    two.finish_restarts()
    assert _states(two)["gpu0"] == "draining"


def test_drains_and_resumes_are_logged_once() -> None:
    two = _two()
    for _ in range(2):
        two.drain(gpu=1)
    for _ in range(2):
        two.drain(gpu=1, resume=True)
    told = [(notice.event, notice.fields["target"]) for notice in two.notices]
    assert told == [("drained", "GPU 1"), ("resumed", "GPU 1")]
