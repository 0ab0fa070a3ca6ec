"""Lost GPUs: nothing is placed on them, who needs them is told so, and they are used again once they are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceState
from tests.scheduler.builders import gpu_id
from tests.scheduler.play import Play, sized

SMALL, WHOLE, PAIR, HUGE = sized("small", 10), sized("whole", 20), sized("pair", 40), sized("huge", 60)
GPU1 = gpu_id(1)


@pytest.fixture
def two() -> Play:
    return Play(2).begin()


def _lose(play: Play, gpu: GpuUuid = GPU1) -> None:
    play.lost.add(gpu)
    play.read_gpus()


def _find(play: Play, gpu: GpuUuid = GPU1) -> None:
    play.lost.discard(gpu)
    play.read_gpus()


def _states(play: Play) -> dict[str, InstanceState]:
    return {name: view.state for name, view in play.snapshot().instances.items()}


def test_instances_over_a_lost_gpu_take_no_request_and_say_why(two: Play) -> None:
    _lose(two)
    assert _states(two) == {
        "gpu0": InstanceState.READY, "gpu1": InstanceState.DRAINING, "spread": InstanceState.DRAINING,
    }  # fmt: skip
    assert two.snapshot().instances[InstanceName("spread")].reason == "GPU 1 is lost: GPU is lost"
    granted = [two.arrive(WHOLE), two.arrive(SMALL)]
    two.work_through()
    assert two.grant(granted[0]).instance == "gpu0"


def test_what_only_a_lost_gpu_could_hold_is_refused_with_the_reason_and_a_time_to_retry(two: Play) -> None:
    _lose(two)
    two.advance(10.0)
    refused = two.rejection(two.arrive(PAIR))
    assert refused.code == "no_instance"
    assert "GPU 1 is lost (GPU is lost)" in refused.message
    assert refused.retry_after_seconds is not None


def test_what_is_too_large_for_all_gpus_together_is_still_too_large(two: Play) -> None:
    _lose(two)
    two.advance(10.0)
    assert two.rejection(two.arrive(HUGE)).code == "model_too_large"


def test_after_a_short_disturbance_everything_is_as_before(two: Play) -> None:
    ticket = two.arrive(PAIR)
    two.work_through()
    _lose(two)
    two.now += 1.0
    _find(two)
    assert set(_states(two).values()) == {InstanceState.READY}
    assert two.restarting == []
    two.release(ticket)
    assert two.grant(two.arrive(PAIR)).instance == "spread"


def test_servers_over_a_gpu_that_was_lost_for_long_are_restarted_and_used_again(two: Play) -> None:
    _lose(two)
    two.now += 60.0
    _find(two)
    assert sorted(two.restarting) == ["gpu1", "spread"]
    two.finish_restarts()
    two.now += 31.0
    two.read_gpus()
    ticket = two.arrive(PAIR)
    two.work_through()
    assert two.grant(ticket).instance == "spread"


def test_a_server_that_gave_up_without_its_gpu_is_started_again(two: Play) -> None:
    _lose(two)
    two.change_instance("gpu1", InstanceState.FATAL)
    two.now += 60.0
    _find(two)
    assert "gpu1" in two.restarting


def test_an_attached_server_is_used_again_without_a_restart() -> None:
    two = Play(2)
    two.specs = {name: replace(spec, attached=True) for name, spec in two.specs.items()}
    two.begin()
    _lose(two)
    two.change_instance("gpu1", InstanceState.READY)
    assert _states(two)["gpu1"] is InstanceState.DRAINING
    two.now += 60.0
    _find(two)
    assert (_states(two)["gpu1"], two.restarting) == (InstanceState.READY, [])
