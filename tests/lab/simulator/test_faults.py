"""Each fault has its effect, and the router recovers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.gpu import GpuUuid
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.faults import Fault, FaultKind
from router.lab.simulator.requests import SERVED
from router.lab.simulator.runner import Outcome, Simulation

SPEC = ScenarioSpec("3090", "llama3.1:8b", seconds=120.0, requests_per_second=0.2)


def run_with(fault: Fault | None, policy: str = "llamayard", spec: ScenarioSpec = SPEC) -> Outcome:
    scenario = replace(make_scenario(spec), faults=(fault,) if fault is not None else ())
    return Simulation(scenario, make_baseline(policy, scenario)).run()


def residency_spans(outcome: Outcome) -> list[tuple[float, float | None]]:
    return [(span.began_at, span.ended_at) for span in outcome.stats.residency_spans]


@pytest.mark.parametrize("policy", ["llamayard", "stock-0.24", "nginx-least-conn"])
def test_a_crashed_server_loses_its_models_and_is_restarted(policy: str) -> None:
    outcome = run_with(Fault(60.0, FaultKind.DIES), policy)
    assert residency_spans(outcome)[0][1] == 60.0
    assert len(residency_spans(outcome)) > 1
    assert outcome.requests[-1].outcome == SERVED
    assert outcome.stats.notes == [(60.0, "dies 0")]


def test_requests_without_a_token_are_retried_when_their_server_crashes() -> None:
    normal = run_with(None)
    waiting = next(r for r in normal.requests if r.first_token_at is not None and r.first_token_at - r.arrived_at > 0.2)
    outcome = run_with(Fault(waiting.arrived_at + 0.1, FaultKind.DIES))
    again = next(r for r in outcome.requests if r.id == waiting.id)
    assert again.outcome == SERVED
    assert (again.ttft_seconds or 0) > (waiting.ttft_seconds or 0)


def test_a_lost_gpu_has_no_server_until_it_is_back() -> None:
    outcome = run_with(Fault(30.0, FaultKind.LOST, seconds=40.0))
    load_starts = [began for began, _ in residency_spans(outcome)]
    assert not [began for began in load_starts if 30.0 <= began < 70.0]
    assert [began for began in load_starts if began >= 70.0]


def test_a_throttled_gpu_is_slower() -> None:
    normal, hot = run_with(None), run_with(Fault(0.0, FaultKind.HOT, amount=3.0, seconds=10_000.0))
    first, slower = normal.requests[-1], hot.requests[-1]
    assert first.tokens_per_second is not None
    assert slower.tokens_per_second == pytest.approx(first.tokens_per_second / 3, rel=0.3)


def test_external_memory_use_lasts_for_its_duration() -> None:
    scenario = make_scenario(SPEC)
    simulation = Simulation(
        replace(scenario, faults=(Fault(10.0, FaultKind.EXTERNAL, amount=0.5, seconds=20.0),)),
        make_baseline("stock-0.24", scenario),
    )
    ledger, readings = simulation.machine.ledger, dict[float, int]()
    uuid: GpuUuid = ledger.gpus[0].uuid
    for at in (9.0, 11.0, 31.0):
        simulation.machine.timeline.at(at, lambda at=at: readings.update({at: ledger.external_bytes[uuid]}))
    simulation.run()
    assert readings == {9.0: 0, 11.0: ledger.gpus[0].usable_bytes // 2, 31.0: 0}


def test_external_memory_use_is_limited_to_what_is_free() -> None:
    scenario = replace(make_scenario(SPEC), faults=(Fault(60.0, FaultKind.EXTERNAL, amount=1.0, seconds=10.0),))
    simulation = Simulation(scenario, make_baseline("stock-0.24", scenario))
    ledger, used = simulation.machine.ledger, dict[float, int]()
    uuid: GpuUuid = ledger.gpus[0].uuid
    for at in (59.0, 61.0, 71.0):
        simulation.machine.timeline.at(at, lambda at=at: used.update({at: ledger.used_bytes(uuid)}))
    simulation.run()
    assert 0 < used[59.0] == used[71.0] < used[61.0] == ledger.gpus[0].usable_bytes


def test_a_slow_disk_slows_a_cold_load() -> None:
    cold = replace(SPEC, cold_start=True)
    normal = run_with(None, spec=cold).stats.residency_spans[0]
    slow = run_with(Fault(0.0, FaultKind.SLOW_DISK, amount=0.25, seconds=10_000.0), spec=cold).stats.residency_spans[0]
    assert normal.ready_at is not None
    assert slow.ready_at is not None
    assert slow.ready_at - slow.began_at > 3 * (normal.ready_at - normal.began_at)
