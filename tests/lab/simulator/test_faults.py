"""What goes wrong in a run does what it says, and the router goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.gpu import GpuUuid
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.faults import Fault, FaultKind
from router.lab.simulator.requests import SERVED
from router.lab.simulator.runner import Outcome, Simulation

WANTED = ScenarioSpec("3090", "llama3.1:8b", seconds=120.0, requests_per_second=0.2)


def played(fault: Fault | None, policy: str = "llamayard", wanted: ScenarioSpec = WANTED) -> Outcome:
    scenario = replace(make_scenario(wanted), faults=(fault,) if fault is not None else ())
    return Simulation(scenario, make_baseline(policy, scenario)).run()


def residency_spans(outcome: Outcome) -> list[tuple[float, float | None]]:
    return [(span.began_at, span.ended_at) for span in outcome.stats.residency_spans]


@pytest.mark.parametrize("policy", ["llamayard", "stock-0.24", "nginx-least-conn"])
def test_a_server_that_dies_loses_its_models_and_is_started_again(policy: str) -> None:
    outcome = played(Fault(60.0, FaultKind.DIES), policy)
    assert residency_spans(outcome)[0][1] == 60.0
    assert len(residency_spans(outcome)) > 1
    assert outcome.requests[-1].outcome == SERVED
    assert outcome.stats.notes == [(60.0, "dies 0")]


def test_requests_without_a_word_yet_are_placed_anew_when_their_server_dies() -> None:
    calm = played(None)
    waiting = next(r for r in calm.requests if r.first_token_at is not None and r.first_token_at - r.arrived_at > 0.2)
    outcome = played(Fault(waiting.arrived_at + 0.1, FaultKind.DIES))
    again = next(r for r in outcome.requests if r.id == waiting.id)
    assert again.outcome == SERVED
    assert (again.ttft_seconds or 0) > (waiting.ttft_seconds or 0)


def test_a_lost_gpu_has_no_server_until_it_is_back() -> None:
    outcome = played(Fault(30.0, FaultKind.LOST, seconds=40.0))
    begun = [began for began, _ in residency_spans(outcome)]
    assert not [began for began in begun if 30.0 <= began < 70.0]
    assert [began for began in begun if began >= 70.0]


def test_a_hot_gpu_is_slower_while_it_is_hot() -> None:
    calm, hot = played(None), played(Fault(0.0, FaultKind.HOT, amount=3.0, seconds=10_000.0))
    first, slower = calm.requests[-1], hot.requests[-1]
    assert first.tokens_per_second is not None
    assert slower.tokens_per_second == pytest.approx(first.tokens_per_second / 3, rel=0.3)


def test_what_others_take_is_gone_for_the_time_they_take_it() -> None:
    scenario = make_scenario(WANTED)
    simulation = Simulation(
        replace(scenario, faults=(Fault(10.0, FaultKind.EXTERNAL, amount=0.5, seconds=20.0),)),
        make_baseline("stock-0.24", scenario),
    )
    ledger, seen = simulation.machine.ledger, dict[float, int]()
    uuid: GpuUuid = ledger.gpus[0].uuid
    for at in (9.0, 11.0, 31.0):
        simulation.machine.timeline.at(at, lambda at=at: seen.update({at: ledger.external_bytes[uuid]}))
    simulation.run()
    assert seen == {9.0: 0, 11.0: ledger.gpus[0].usable_bytes // 2, 31.0: 0}


def test_others_take_no_more_than_is_free() -> None:
    scenario = replace(make_scenario(WANTED), faults=(Fault(60.0, FaultKind.EXTERNAL, amount=1.0, seconds=10.0),))
    simulation = Simulation(scenario, make_baseline("stock-0.24", scenario))
    ledger, used = simulation.machine.ledger, dict[float, int]()
    uuid: GpuUuid = ledger.gpus[0].uuid
    for at in (59.0, 61.0, 71.0):
        simulation.machine.timeline.at(at, lambda at=at: used.update({at: ledger.used_bytes(uuid)}))
    simulation.run()
    assert 0 < used[59.0] == used[71.0] < used[61.0] == ledger.gpus[0].usable_bytes


def test_a_slow_disk_makes_a_cold_load_longer() -> None:
    cold = replace(WANTED, cold_start=True)
    calm = played(None, wanted=cold).stats.residency_spans[0]
    slow = played(Fault(0.0, FaultKind.SLOW_DISK, amount=0.25, seconds=10_000.0), wanted=cold).stats.residency_spans[0]
    assert calm.ready_at is not None
    assert slow.ready_at is not None
    assert slow.ready_at - slow.began_at > 3 * (calm.ready_at - calm.began_at)
