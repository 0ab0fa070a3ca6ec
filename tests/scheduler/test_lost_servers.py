"""A load lost with its server is retried once when the server is back; its requests keep waiting."""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Grant, Reject
from router.domain.instance import InstanceName, InstanceState
from router.domain.policy import Policy
from router.domain.snapshot import Failure
from router.scheduler.placement.placement import MustWait, NoFit, Placed, PlacementRequest, place
from tests.scheduler.builders import by_weight, gpu, model, snapshot, view
from tests.scheduler.play import Play, sized

SMALL = model("small", 10_000)
GPU_MODELS, PAIR = (gpu(0, 23_000), gpu(1, 11_000)), (view("gpu0", 0), view("gpu1", 1))
NOW = snapshot().now


def _lost(ago_seconds: float, *, is_lost: bool = True) -> Failure:
    return Failure(InstanceName("gpu0"), SMALL.blob, (), 502, "gone", NOW - ago_seconds, is_lost)


def test_a_lost_load_is_retried_after_a_health_check_must_have_happened() -> None:
    def decided(*failures: Failure) -> object:
        return place(snapshot(GPU_MODELS, PAIR, failures=failures), by_weight, PlacementRequest(SMALL))

    for failures, there in (((_lost(5.0),), "gpu0"), ((_lost(0.5),), "gpu1"), ((_lost(9.0), _lost(5.0)), "gpu1")):
        placed = decided(*failures)
        assert isinstance(placed, Placed)
        assert placed.instance == there
    refused = decided(_lost(5.0, is_lost=False))
    assert isinstance(refused, Placed)
    assert refused.instance == "gpu1"


def test_without_another_place_requests_wait_and_fail_after_the_second_loss() -> None:
    def decided(*failures: Failure) -> object:
        return place(snapshot(GPU_MODELS[:1], PAIR[:1], failures=failures), by_weight, PlacementRequest(SMALL))

    assert isinstance(decided(_lost(0.5)), MustWait)
    again = decided(_lost(9.0), _lost(0.5))
    assert isinstance(again, NoFit)
    assert (again.code, again.status, again.message) == ("load_failed", 502, "gone")
    attached = replace(PAIR[0], spec=replace(PAIR[0].spec, attached=True))
    gone = place(
        snapshot(GPU_MODELS[:1], (attached,), failures=(_lost(9.0), _lost(0.5))), by_weight, PlacementRequest(SMALL)
    )
    assert isinstance(gone, NoFit)
    assert (gone.code, gone.status) == ("no_instance", None)


def _lose(play: Play) -> None:
    """The server exits during the load and comes back. The driver may notice it before the supervisor."""
    (load,) = play.loads
    play.fail_load(load, 502, "server disconnected", is_lost=True)
    play.change_instance("gpu0", InstanceState.BACKOFF, "ended with signal 15")
    play.advance(1.0)
    play.change_instance("gpu0", InstanceState.STARTING)
    play.change_instance("gpu0", InstanceState.READY)
    play.advance(1.0)


def test_requests_that_wait_for_a_model_survive_the_end_of_the_server_that_loads_it() -> None:
    play = Play(1, Policy(vram_margin_bytes=0)).begin()
    waiting = [play.arrive(sized("small", 10)), play.arrive(sized("small", 10))]
    _lose(play)
    assert not play.endings
    play.work_through()
    assert all(isinstance(play.endings[ticket], Grant) for ticket in waiting)


def test_a_load_that_ends_its_server_each_time_is_given_up() -> None:
    play = Play(1, Policy(vram_margin_bytes=0)).begin()
    waiting = play.arrive(sized("small", 10))
    _lose(play)
    _lose(play)
    ending = play.endings[waiting]
    assert isinstance(ending, Reject)
    assert (ending.code, ending.status) == ("load_failed", 502)
