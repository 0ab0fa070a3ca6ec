"""Large models that are loaded while nothing is asked, and how such a load gives way."""

from __future__ import annotations

import pytest

from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy, Rest, SchedulerConstants
from router.domain.residency import ResidencyState
from tests.scheduler.play import Play, sized

SMALL, OTHER, LARGE = sized("small", 10), sized("other", 10), sized("large", 40)
REST = Rest(bytes_per_hour=1e9, weight=0.5)


def serve(play: Play, of: ModelFacts) -> None:
    """One request, from its arrival to its end."""
    play.arrive(of)
    play.work_through()
    for ticket in list(play.leases):
        play.release(ticket)


def small_is_loaded(rest: Rest | None = REST, large: int = 4, pins: dict[str, Pin] | None = None) -> Play:
    """Two GPUs; `large` requests of the large model, which then has left for a small one. A load of the large model
    takes longer than anybody wants to wait."""
    constants = SchedulerConstants(load_fixed_seconds=0.5, load_bytes_per_second=5.0, demand_half_life_seconds=1e6)
    policy = Policy(vram_margin_bytes=0, ttft_target_seconds=5.0, rest=rest, pins=pins or {}, constants=constants)
    play = Play(2, policy).begin()
    for _ in range(large):
        serve(play, LARGE)
    serve(play, SMALL)
    assert play.state("gpu0", SMALL) is ResidencyState.READY or play.state("gpu1", SMALL) is ResidencyState.READY
    return play


def rest_begins(play: Play) -> bool:
    """Whether the large model is loaded after a pause. The load runs then."""
    play.advance(1.5)
    play.read_gpus()
    for key in list(play.unloads):
        play.finish_unload(key)
    play.now += 0.1
    play.read_gpus()
    return bool(play.loads)


def test_a_large_model_that_is_requested_often_is_loaded_while_nothing_is_asked() -> None:
    play = small_is_loaded()
    assert rest_begins(play)
    play.work_through()
    found = play.residency("spread", LARGE)
    assert found is not None
    assert found.state is ResidencyState.READY
    assert "unasked" in found.reason
    ticket = play.arrive(LARGE)
    assert play.grant(ticket).instance == "spread"


@pytest.mark.parametrize(
    ("rest", "large"),
    [
        (None, 4),
        (Rest(39.0, weight=0.5), 4),
        (Rest(1e9, pause_seconds=100.0, weight=0.5), 4),
        (Rest(1e9, weight=50.0), 4),
        (REST, 0),
    ],
)
def test_nothing_is_loaded_without_leave(rest: Rest | None, large: int) -> None:
    assert not rest_begins(small_is_loaded(rest, large))


def test_a_model_that_is_kept_warm_does_not_leave_for_it() -> None:
    assert not rest_begins(small_is_loaded(pins={"small": Pin(keep_warm=True)}))


def test_the_budget_of_an_hour_ends_it() -> None:
    play = small_is_loaded(Rest(60.0, weight=0.5))
    assert rest_begins(play)
    play.work_through()
    serve(play, SMALL)
    assert not rest_begins(play)


def test_an_unasked_load_gives_way_to_a_request_that_needs_room() -> None:
    play = small_is_loaded()
    assert rest_begins(play)
    (load,) = play.loads
    ticket = play.arrive(OTHER)
    assert play.aborted == [load]
    assert play.state("spread", LARGE) is ResidencyState.UNLOADING
    play.read_gpus(progress=0.2)  # little is used yet, but the server may be about to take more
    assert not play.loads
    play.finish_unload(("spread", LARGE.blob))  # type: ignore[arg-type]
    play.now += 0.1
    play.read_gpus()
    assert [sent.model for sent in play.loads.values()] == [OTHER]
    play.work_through()
    assert play.grant(ticket).instance in ("gpu0", "gpu1")
    assert not play.snapshot().failures


def test_an_unasked_plan_that_was_not_sent_is_dropped() -> None:
    play = small_is_loaded()
    play.advance(1.5)
    play.read_gpus()
    assert play.state("spread", LARGE) is ResidencyState.PLANNED
    play.arrive(OTHER)
    assert play.state("spread", LARGE) is None
    assert not play.aborted


def test_a_load_that_somebody_waits_for_by_now_does_not_give_way() -> None:
    play = small_is_loaded()
    assert rest_begins(play)
    ticket = play.arrive(LARGE)
    play.arrive(OTHER)
    assert not play.aborted
    play.work_through()
    assert play.grant(ticket).instance == "spread"


def test_a_broken_off_load_that_had_ended_is_unloaded_all_the_same() -> None:
    play = small_is_loaded()
    assert rest_begins(play)
    (load,) = play.loads
    sent = play.loads[load]
    ticket = play.arrive(OTHER)
    play.loads[load] = sent
    play.finish_load(load)  # its answer was on its way
    assert play.state("spread", LARGE) is ResidencyState.UNLOADING
    play.work_through()
    assert play.grant(ticket).instance in ("gpu0", "gpu1")
