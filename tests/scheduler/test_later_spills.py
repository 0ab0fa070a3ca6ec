"""A model that comes to be partly on the CPU after its load is unloaded when it is idle, and planned anew."""

from __future__ import annotations

from dataclasses import replace

from router.domain.residency import ResidencyState
from tests.scheduler.builders import key
from tests.scheduler.play import Play, sized

MODEL, OTHER = sized("model", 20, layers=1), sized("other", 4, layers=1)


def _loaded(gpus: int = 2) -> Play:
    play = Play(gpus).begin()
    ticket = play.arrive(MODEL)
    play.work_through()
    assert play.grant(ticket).instance == "gpu0"
    play.now += 1.0
    play.list_models("gpu0")
    return play


def test_it_takes_no_new_request_and_is_unloaded_when_its_requests_have_ended() -> None:
    play = _loaded()
    play.now += 1.0
    play.list_models("gpu0", on_cpu=10)
    assert [notice.event for notice in play.notices] == ["model_on_cpu"]
    assert not play.unloads
    meanwhile = play.arrive(MODEL)
    play.work_through()
    assert play.grant(meanwhile).instance == "gpu1"
    (running,) = [ticket for ticket, lease in play.leases.items() if lease[0] == key("gpu0", MODEL)]
    play.release(running)
    assert list(play.unloads) == [key("gpu0", MODEL)]
    play.work_through()
    assert play.residency("gpu0", MODEL) is None


def test_it_is_reported_once() -> None:
    play = _loaded()
    for _ in range(3):
        play.now += 1.0
        play.list_models("gpu0", on_cpu=10)
    assert len(play.notices) == 1


def test_without_another_place_it_is_loaded_there_once_more() -> None:
    play = _loaded(gpus=1)
    play.now += 1.0
    play.list_models("gpu0", on_cpu=10)
    (running,) = play.leases
    waiting = play.arrive(MODEL)
    play.release(running)
    play.work_through()
    assert play.grant(waiting).instance == "gpu0"
    assert play.state("gpu0", MODEL) is ResidencyState.READY
    assert play.loads_sent == 2


def test_rounding_and_attached_servers_are_left_alone() -> None:
    play = _loaded()
    play.now += 1.0
    play.list_models("gpu0", on_cpu=1)
    assert not play.notices
    attached = Play(1)
    attached.specs = {name: replace(spec, attached=True) for name, spec in attached.specs.items()}
    attached.begin()
    attached.arrive(OTHER)
    attached.work_through()
    attached.now += 1.0
    attached.list_models("gpu0", on_cpu=3)
    assert [notice.event for notice in attached.notices] == ["model_on_cpu"]
    assert not attached.unloads
