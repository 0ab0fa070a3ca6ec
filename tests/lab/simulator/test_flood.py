"""One greedy client among nine others, in virtual time: it gets what they leave, and they hardly notice it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.requests import SERVED, Request
from router.lab.simulator.runner import Simulation
from router.lab.simulator.workload import Session, Turn

MODEL = "llama3.1:8b"
NORMAL_CLIENTS = 9
_BEGIN_SECONDS = 40.0
"""Requests before this, when the model is loaded first, do not count."""


def _sessions(each_per_second: float, flood_per_second: float, seconds: float) -> tuple[Session, ...]:
    """Requests of 300 prompt and 150 output tokens at random times."""
    rng = random.Random(1)
    rates = {f"normal{number}": each_per_second for number in range(NORMAL_CLIENTS)} | {"greedy": flood_per_second}
    sent: list[tuple[float, str]] = []
    for user, rate in rates.items():
        at = rng.expovariate(rate) if rate else seconds
        while at < seconds:
            sent.append((at, user))
            at += rng.expovariate(rate)
    turns = ((user, Turn(at, 300, 0, 150)) for at, user in sorted(sent))
    return tuple(Session(number, user, MODEL, (turn,)) for number, (user, turn) in enumerate(turns))


def _normal(rig: str, each_per_second: float, flood_per_second: float, seconds: float) -> list[Request]:
    scenario = make_scenario(ScenarioSpec(rig, MODEL, 1, 60.0, deviates=False))
    sessions = _sessions(each_per_second, flood_per_second, seconds)
    run = Simulation(replace(scenario, sessions=sessions, seconds=seconds), make_baseline("llamayard", scenario)).run()
    return [each for each in run.requests if each.user != "greedy" and each.arrived_at > _BEGIN_SECONDS]


def _p95_seconds(requests: list[Request]) -> float:
    return sorted((each.ended_at or 0.0) - each.arrived_at for each in requests)[int(0.95 * len(requests))]


@pytest.mark.parametrize(
    ("rig", "each_per_second"), [("2x3090", 0.2), ("4x3090", 0.4)], ids=["two GPUs", "four GPUs, busier"]
)
def test_a_flood_makes_others_wait_at_most_half_as_long_again(rig: str, each_per_second: float) -> None:
    quiet, flooded = (_normal(rig, each_per_second, flood, 150.0) for flood in (0.0, 25.0))
    assert len(quiet) == len(flooded) > 150
    assert {each.outcome for each in flooded} == {SERVED}
    assert _p95_seconds(flooded) <= 1.5 * _p95_seconds(quiet)


@pytest.mark.parametrize(
    ("rig", "each_per_second", "flood_per_second", "seconds"),
    [
        ("2x3090", 0.4, 25.0, 150.0),
        ("3090", 0.3, 8.0, 400.0),  # longer than it takes for requests in the queue to come close to their deadline
    ],
)
def test_on_few_slots_a_flood_costs_others_at_most_one_answer(
    rig: str, each_per_second: float, flood_per_second: float, seconds: float
) -> None:
    """All slots are in use all the time, and no answer is interrupted: others wait for the end of one."""
    quiet = _normal(rig, each_per_second, 0.0, seconds)
    flooded = _normal(rig, each_per_second, flood_per_second, seconds)
    answer_seconds = min((each.ended_at or 0.0) - each.arrived_at for each in quiet)
    assert len(quiet) == len(flooded) > 300
    assert {each.outcome for each in flooded} == {SERVED}
    assert _p95_seconds(flooded) <= _p95_seconds(quiet) + 1.1 * answer_seconds
