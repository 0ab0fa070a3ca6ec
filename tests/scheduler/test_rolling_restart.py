"""A restart that an operator requests: one instance after the other, and no request fails because of it."""

from __future__ import annotations

from router.domain.actions import Grant
from router.domain.instance import InstanceName, InstanceState
from router.domain.model import ModelFacts
from router.domain.request import TicketId
from router.domain.residency import ResidencyState
from tests.scheduler.builders import gpu_id, key
from tests.scheduler.play import Play, sized

SMALL, OTHER, WHOLE, PAIR = sized("small", 10), sized("other", 10), sized("whole", 20), sized("pair", 40)


def _two() -> Play:
    return Play(2).begin()


def _serve(play: Play, of: ModelFacts) -> TicketId:
    ticket = play.arrive(of)
    play.work_through()
    assert isinstance(play.endings[ticket], Grant)
    return ticket


def _events(play: Play) -> list[str]:
    return [notice.event for notice in play.notices]


def test_idle_instances_are_restarted_one_after_the_other() -> None:
    two = _two()
    two.restart("gpu0", "gpu1")
    assert two.restarting == ["gpu0"]
    two.advance(1.0)
    two.change_instance("gpu0", InstanceState.STARTING)
    assert two.restarting == []
    two.change_instance("gpu0", InstanceState.READY)
    assert two.restarting == ["gpu1"]
    two.advance(1.0)
    two.finish_restarts()
    assert _events(two) == ["restart_requested", "restart_finished"]
    assert two.snapshot().rolling is None


def test_running_requests_end_before_the_restart() -> None:
    two = _two()
    ticket = _serve(two, WHOLE)
    two.restart("gpu0")
    assert two.restarting == []
    assert two.snapshot().instances[InstanceName("gpu0")].state is InstanceState.DRAINING
    two.advance(100.0)
    two.release(ticket)
    assert two.restarting == ["gpu0"]


def test_requests_that_do_not_end_delay_a_restart_for_a_bounded_time() -> None:
    two = _two()
    _serve(two, WHOLE)
    two.restart("gpu0", timeout_seconds=50.0)
    assert two.next_wake is not None
    two.advance(49.0)
    assert two.restarting == []
    two.advance(2.0)
    assert two.restarting == ["gpu0"]


def test_a_model_in_demand_is_loaded_elsewhere_first() -> None:
    two = _two()
    for _ in range(3):
        two.release(_serve(two, WHOLE))
    two.restart("gpu0")
    assert two.restarting == []
    assert two.state("gpu1", WHOLE) is ResidencyState.LOADING
    still_here = two.arrive(WHOLE)
    assert two.grant(still_here).instance == "gpu0"
    two.release(still_here)
    two.finish_load(next(iter(two.loads)))
    assert two.restarting == ["gpu0"]
    meanwhile = two.arrive(WHOLE)
    assert two.grant(meanwhile).instance == "gpu1"


def test_requests_for_what_only_this_instance_has_wait_for_it() -> None:
    two = _two()
    running = _serve(two, PAIR)
    two.restart("spread")
    two.advance(70.0)
    waiting = two.arrive(PAIR)
    two.advance(100.0)
    assert waiting not in two.endings
    two.release(running)
    two.work_through()
    assert two.grant(waiting).instance == "spread"


def test_a_restart_under_load_rejects_nobody() -> None:
    two = _two()
    tickets = [_serve(two, WHOLE), _serve(two, OTHER)]
    two.restart("gpu0", "gpu1", "spread")
    for _ in range(40):
        for ticket in list(two.leases):
            two.release(ticket)
        tickets += [two.arrive(WHOLE), two.arrive(OTHER)]
        two.work_through(rounds=2)
        two.advance(1.0)
    two.work_through()
    assert "restart_finished" in _events(two)
    assert all(isinstance(two.endings[ticket], Grant) for ticket in tickets if ticket in two.endings)
    assert len(two.endings) > 60


def test_if_a_server_does_not_come_back_the_others_are_left_alone() -> None:
    two = _two()
    two.restart("gpu0", "gpu1")
    two.advance(1.0)
    two.change_instance("gpu0", InstanceState.FATAL, "no such library")
    two.advance(1.0)
    assert two.snapshot().rolling is None
    called_off = two.notices[-1]
    assert (called_off.event, called_off.fields["not_restarted"]) == ("restart_called_off", ["gpu1"])
    assert "no such library" in str(called_off.fields["reason"])


def test_a_server_that_takes_too_long_to_start_calls_the_restart_off() -> None:
    two = _two()
    two.restart("gpu0", "gpu1")
    two.advance(1.0)
    two.change_instance("gpu0", InstanceState.STARTING)
    two.advance(200.0)
    assert two.notices[-1].event == "restart_called_off"


def test_a_server_that_gave_up_is_started_again() -> None:
    two = _two()
    two.change_instance("gpu0", InstanceState.FATAL, "no such library")
    two.restart("gpu0")
    assert two.restarting == ["gpu0"]


def test_an_instance_over_a_lost_gpu_is_skipped() -> None:
    two = _two()
    two.lost.add(gpu_id(0))
    two.read_gpus()
    two.restart("gpu0", "gpu1")
    assert two.restarting == ["gpu1"]
    assert "restart_skipped" in _events(two)


def test_a_drained_instance_is_restarted_and_stays_drained() -> None:
    two = _two()
    two.drain(gpu=0)
    two.restart("gpu0")
    assert two.restarting == ["gpu0"]
    two.advance(1.0)
    two.finish_restarts()
    assert two.snapshot().instances[InstanceName("gpu0")].state is InstanceState.DRAINING
    two.advance(1.0)
    assert two.snapshot().rolling is None


def test_its_models_leave_with_the_server() -> None:
    two = _two()
    two.release(_serve(two, PAIR))
    two.restart("spread")
    assert two.restarting == ["spread"]
    assert not two.unloads
    two.finish_restarts()
    assert key("spread", PAIR) not in two.held
