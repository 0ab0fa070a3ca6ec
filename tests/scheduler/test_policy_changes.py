"""Settings that are reloaded hold from the next event on."""

from __future__ import annotations

from dataclasses import replace

from router.domain.events import ModelDiscovered, PolicyChanged
from router.domain.policy import Pin, Policy
from router.domain.residency import ResidencyState
from tests.scheduler.builders import gpu_id
from tests.scheduler.play import Play, sized

SMALL, OTHER = sized("small", 10), sized("other", 20)
POLICY = Policy(vram_margin_bytes=0)


def test_a_new_limit_of_the_queue_holds_for_the_next_request() -> None:
    one = Play(1, POLICY).begin()
    one.post(PolicyChanged(replace(POLICY, queue_limit=1)))
    first, second = one.arrive(SMALL), one.arrive(SMALL)
    assert first not in one.endings
    assert "queue.limit=1" in one.rejection(second).message


def test_a_model_that_becomes_warm_is_loaded_and_one_that_is_no_longer_can_be_evicted() -> None:
    one = Play(1, POLICY).begin()
    one.post(PolicyChanged(replace(POLICY, pins={"small": Pin(keep_warm=True)})))
    one.post(ModelDiscovered(SMALL))
    one.work_through()
    assert one.state("gpu0", SMALL) is ResidencyState.READY
    one.advance(5.0)
    assert one.rejection(one.arrive(OTHER)).code == "model_too_large"
    one.post(PolicyChanged(POLICY))
    ticket = one.arrive(OTHER)
    one.work_through()
    assert one.grant(ticket).instance == "gpu0"


def test_a_new_pin_decides_about_the_next_load() -> None:
    two = Play(2, POLICY).begin()
    two.post(PolicyChanged(replace(POLICY, pins={"small": Pin(gpus=(gpu_id(1),))})))
    ticket = two.arrive(SMALL)
    two.work_through()
    assert two.grant(ticket).instance == "gpu1"
