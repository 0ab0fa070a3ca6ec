"""A model that fits but for the memory of other programs: refused for now, not as too large for the machine."""

from __future__ import annotations

from tests.scheduler.builders import gpu_id
from tests.scheduler.play import Play, sized

WHOLE, HUGE = sized("whole", 20), sized("huge", 60)
GPU0 = gpu_id(0)


def _taken(amount: int) -> Play:
    play = Play(1).begin()
    play.external[GPU0] = amount
    play.read_gpus()
    play.advance(10.0)
    return play


def test_it_is_refused_with_who_is_in_the_way_and_a_time_to_retry() -> None:
    play = _taken(20)
    refused = play.rejection(play.arrive(WHOLE))
    assert (refused.code, refused.status) == ("model_too_large", 503)
    assert refused.message.startswith("other programs hold ")
    assert "of GPU 0: model 'whole" in refused.message
    assert refused.retry_after_seconds is not None


def test_it_is_loaded_once_the_memory_is_back() -> None:
    play = _taken(20)
    play.rejection(play.arrive(WHOLE))
    play.external[GPU0] = 0
    play.read_gpus()
    play.advance(10.0)
    ticket = play.arrive(WHOLE)
    play.work_through()
    assert play.grant(ticket).instance == "gpu0"


def test_what_the_empty_gpu_could_not_hold_is_too_large() -> None:
    play = _taken(20)
    refused = play.rejection(play.arrive(HUGE))
    assert (refused.code, refused.status, refused.retry_after_seconds) == ("model_too_large", None, None)


def test_a_desktops_memory_is_not_waited_for() -> None:
    play = _taken(1)
    assert play.rejection(play.arrive(sized("tight", 24))).status is None
