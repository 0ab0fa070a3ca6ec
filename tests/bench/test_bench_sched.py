"""The benchmark over emulated servers: scaled clock, figures from answers and loads, and the order of runs."""

from __future__ import annotations

import argparse

import pytest

from bench.scheduling.bench_sched import planned_runs, report_of, with_measured_answers
from bench.scheduling.bench_sim import delay_arrivals
from bench.scheduling.client import MeasuredRequest
from bench.scheduling.fast_clock import scaled
from router.lab.scenarios import ScenarioSpec, make_scenario
from router.lab.simulator.metrics import Punctuality


def test_a_scaled_clock_starts_at_the_real_time_and_runs_faster() -> None:
    readings = iter([100.0, 100.0, 100.5])
    clock = scaled(lambda: next(readings), 8.0)
    assert [clock(), clock()] == [100.0, 104.0]


def answered(turn: int, model: str, first: float | None, ended: float, error: str = "") -> MeasuredRequest:
    return MeasuredRequest(0, turn, "anna", model, 100, 0, 10.0, first, ended, generated_tokens=21, error=error)


def test_figures_come_from_client_measurements_and_recorded_loads() -> None:
    scenario = make_scenario(ScenarioSpec("4x3090", "team"))
    answers = [
        answered(0, "llama3.1:8b", 11.0, 13.0),
        answered(1, "llama3.1:8b", 21.0, 23.0),
        answered(2, "llama3.3:70b", 12.0, 17.0),
        answered(3, "llama3.1:8b", None, 60.0, "500: no"),
    ]
    load: dict[str, object] = {"weights_bytes": 5_000_000_000, "is_whole": True, "problem": None}
    loads = [load, {**load, "is_whole": False}, {**load, "problem": "CUDA error: out of memory"}]
    made = report_of(scenario, answers, loads)
    assert (made.requests, made.errors) == (4, 1)
    assert (made.punctuality, made.small_punctuality) == (Punctuality(4, 2, 1), Punctuality(3, 2, 1))
    assert (made.small.p95, made.large.p95) == (50.0, 2.0)
    assert (made.loads, made.loaded_gb, made.spills, made.out_of_memory) == (2, 10.0, 1, 1)
    assert made.tokens_per_second == pytest.approx(63 / 60)


def test_the_simulator_gets_the_measured_answer_lengths() -> None:
    scenario = make_scenario(ScenarioSpec("4x3090", "team", seconds=20.0))
    answers = [
        MeasuredRequest(session.id, turn, session.user, session.model, 100, 5, 0.0, generated_tokens=7)
        for session in scenario.sessions
        for turn in range(len(session.turns))
    ]
    turns = [turn for session in with_measured_answers(scenario, answers) for turn in session.turns]
    assert {(turn.generated_tokens, turn.shared_tokens) for turn in turns} == {(7, 5)}


def test_policies_rotate_and_nginx_runs_a_limited_number_of_seeds() -> None:
    arguments = argparse.Namespace(
        seeds=[1, 2],
        cells=["4x3090/team"],
        policies=["stock-0.24", "nginx-least-conn", "llamayard"],
        nginx_seeds=1,
        speed=8.0,
        seconds=60.0,
    )
    assert [(run.seed, run.policy) for run in planned_runs(arguments)] == [
        (1, "stock-0.24"),
        (1, "nginx-least-conn"),
        (1, "llamayard"),
        (2, "llamayard"),
        (2, "stock-0.24"),
    ]


def test_arrivals_are_delayed_by_up_to_a_second_deterministically() -> None:
    sessions = make_scenario(ScenarioSpec("4x3090", "team", seconds=60.0)).sessions
    moved = delay_arrivals(sessions, 3)
    turns = list(zip(*([t for one in which for t in one.turns] for which in (sessions, moved)), strict=True))
    assert all(0.0 <= new.at_seconds - old.at_seconds < 1.0 for old, new in turns)
    assert max(new.at_seconds - old.at_seconds for old, new in turns) > 0.5
    assert moved == delay_arrivals(sessions, 3) != delay_arrivals(sessions, 4)
