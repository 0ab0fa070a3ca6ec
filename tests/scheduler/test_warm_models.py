"""Models with `keep_warm`: they are loaded before what clients ask for, and it is told when one cannot be."""

from __future__ import annotations

from dataclasses import replace

from router.domain.events import ModelDiscovered
from router.domain.instance import InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy
from router.domain.residency import ResidencyState
from tests.scheduler.play import Play, sized

FIRST, SECOND, THIRD, WHOLE = (sized(name, 20) for name in ("first", "second", "third", "whole"))
CONSTANTS = Policy().constants


def _play(gpus: int, *warm: ModelFacts) -> Play:
    pins = {model.name: Pin(keep_warm=True) for model in warm}
    return Play(gpus, policy=replace(Policy(vram_margin_bytes=0), pins=pins))


def _discover(play: Play, *models: ModelFacts) -> None:
    for model in models:
        play.post(ModelDiscovered(model))


def test_a_warm_model_that_does_not_fit_is_reported_once_with_the_reason() -> None:
    two = _play(2, FIRST, SECOND, THIRD).begin()
    _discover(two, FIRST, SECOND, THIRD)
    for _ in range(8):
        two.work_through()
        two.advance(1.0)
    assert list(two.snapshot().warm_missing) == ["third"]
    assert "fits nowhere" in two.snapshot().warm_missing["third"]
    told = [notice for notice in two.notices if notice.event == "warm_model_missing"]
    assert [notice.fields["model"] for notice in told] == ["third"]


def test_a_warm_model_that_no_server_has_is_missing() -> None:
    one = _play(1, FIRST).begin()
    assert one.snapshot().warm_missing == {"first": "no server that is running has it"}
    _discover(one, FIRST)
    assert one.snapshot().warm_missing == {"first": "it is not loaded yet"}
    one.work_through()
    assert one.snapshot().warm_missing == {}


def test_at_the_start_a_clients_load_does_not_go_before_warm_models() -> None:
    one = _play(1, FIRST)
    one.change_instance("gpu0", InstanceState.STARTING)
    early = one.arrive(WHOLE)
    one.change_instance("gpu0", InstanceState.READY)
    assert (one.loads_sent, one.reason(early)) == (0, "waits until the models to be kept warm are found")
    _discover(one, FIRST)
    one.work_through()
    assert one.state("gpu0", FIRST) is ResidencyState.READY
    assert one.loads_sent == 1


def test_warm_models_that_are_not_found_delay_nobody_for_long() -> None:
    one = _play(1, FIRST).begin()
    early = one.arrive(WHOLE)
    one.advance(CONSTANTS.warm_discovery_seconds)
    one.work_through()
    assert one.grant(early).instance == "gpu0"


def test_a_warm_model_whose_server_died_is_loaded_again_before_what_waits() -> None:
    one = _play(1, FIRST).begin()
    _discover(one, FIRST)
    one.work_through()
    one.change_instance("gpu0", InstanceState.BACKOFF)
    one.arrive(WHOLE)
    one.change_instance("gpu0", InstanceState.READY)
    one.work_through()
    assert one.state("gpu0", FIRST) is ResidencyState.READY
