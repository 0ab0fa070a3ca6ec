"""Benchmarks the router and its baselines as real processes over EMULATED servers, with acceptance criteria.

`make bench-sched`. Policies run one at a time on an otherwise idle machine: all of them run a cell with one seed before
the next seed begins, in rotating order. Instant swaps are simulated with the answers of the router's run. Emulated time
runs `--speed` times as fast as real time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.scheduling.bench_sim import FLOOR, ROUTER, Cell, Task, criteria, format_cell, mean, mean_in_time, shifted
from bench.scheduling.client import MeasuredRequest, Player
from bench.scheduling.servers import NGINX, STOCK_VERSIONS, RunSetup, nginx, run_baseline
from router.domain.model import ModelFacts
from router.lab.scenarios import ScenarioSpec, default_rate, in_world_of, large_models, make_baseline, make_scenario
from router.lab.simulator.metrics import REFUSED, Report, jain, punctuality, report, ttft_percentiles
from router.lab.simulator.requests import SERVED, Request
from router.lab.simulator.runner import Scenario, Simulation
from router.lab.simulator.workload import Session

CELLS = ("4x3090/team", "4x3090/wide", "4090+3090/team")
ALL = (*STOCK_VERSIONS, *NGINX, ROUTER)
_SECONDS = 480.0
_SIMULATIONS_PER_RUN = 20
"""Number of simulations of each run, with the answers it had."""
_LABEL = "EMULATED servers, real processes"


@dataclass(frozen=True, slots=True)
class Run:
    """One policy, cell and seed."""

    policy: str
    rig: str
    mix: str
    seed: int
    speed: float
    seconds: float

    @property
    def cell(self) -> str:
        return f"{self.rig}/{self.mix}"

    @property
    def scenario(self) -> Scenario:
        return make_scenario(ScenarioSpec(self.rig, self.mix, self.seed, self.seconds))


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of one run."""

    report: Report
    answers: list[MeasuredRequest]
    real_seconds: float


def play(run: Run) -> Measurement:
    """Starts the policy's servers, runs the sessions and stops the servers."""
    scenario = run.scenario
    embeds = frozenset(name for name, model in scenario.models.items() if model.is_embedding)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-sched-") as name:
        setup = RunSetup(run.rig, run.speed, Path(name), tuple(scenario.models.values()))
        with run_baseline(run.policy, setup) as url:
            answers = asyncio.run(Player(url, run.speed, embeds).play(scenario.sessions))
        made = report_of(scenario, answers, setup.loads())
    return Measurement(made, answers, time.monotonic() - began)


def report_of(scenario: Scenario, answers: Sequence[MeasuredRequest], loads: Sequence[dict[str, object]]) -> Report:
    """The figures that the simulator gives of its runs, of what the clients saw and the emulated rig recorded."""
    requests = [_as_request(number, one, scenario.models[one.model]) for number, one in enumerate(answers)]
    large = large_models(scenario)
    small_ones = [one for one in requests if one.model.name not in large]
    large_ones = [one for one in requests if one.model.name in large]
    done = [load for load in loads if load["problem"] is None]
    ended_at = max((one.ended_at for one in answers), default=0.0)
    return Report(
        requests=len(requests),
        punctuality=punctuality(requests),
        small_punctuality=punctuality(small_ones),
        large_punctuality=punctuality(large_ones),
        errors=sum(one.outcome != SERVED for one in requests),
        refused=sum(one.outcome in REFUSED for one in requests),
        hung_up=0,
        small=ttft_percentiles(small_ones, ended_at),
        large=ttft_percentiles(large_ones, ended_at),
        tokens_per_second=sum(one.generated_tokens for one in answers if not one.error) / max(1e-9, ended_at),
        loads=len(done),
        loaded_gb=sum(float(str(load["weights_bytes"])) for load in done) / 1e9,
        spills=sum(not load["is_whole"] for load in done),
        out_of_memory=sum("out of memory" in str(load["problem"]) for load in loads),
        jain=jain(requests),
        busy_shares=(),
        seconds=ended_at,
    )


def _as_request(number: int, one: MeasuredRequest, model: ModelFacts) -> Request:
    return Request(
        id=number,
        user=one.user,
        session=one.session,
        turn=one.turn,
        model=model,
        prompt_tokens=one.prompt_tokens,
        shared_tokens=one.shared_tokens,
        generated_tokens=one.generated_tokens,
        arrived_at=one.arrived_at,
        first_token_at=one.first_token_at,
        ended_at=one.ended_at,
        outcome=one.error or SERVED,
    )


def with_measured_answers(scenario: Scenario, answers: Sequence[MeasuredRequest]) -> tuple[Session, ...]:
    """The sessions with the answer lengths and shared prefixes that were measured."""
    by_turn = {(one.session, one.turn): one for one in answers}
    sessions: list[Session] = []
    for session in scenario.sessions:
        measured_turns = [(turn, by_turn[session.id, number]) for number, turn in enumerate(session.turns)]
        turns = tuple(
            replace(turn, generated_tokens=one.generated_tokens, shared_tokens=one.shared_tokens)
            for turn, one in measured_turns
        )
        sessions.append(replace(session, turns=turns))
    return tuple(sessions)


def in_simulator(policy: str, run: Run, answers: Sequence[MeasuredRequest], times: int = 1) -> dict[int, Report]:
    """Simulates the same requests with the same answers: once unchanged, then with arrivals delayed by up to a second.

    When models thrash, one different load changes everything after it, and real processes are less punctual than
    simulated ones. So only means are comparable, not single runs.
    """
    scenario = run.scenario
    sessions, large = with_measured_answers(scenario, answers), large_models(scenario)
    reports: dict[int, Report] = {}
    for number in range(times):
        replayed = in_world_of(policy, shifted(replace(scenario, sessions=sessions), number))
        reports[number] = report(Simulation(replayed, make_baseline(policy, replayed)).run(), large)
    return reports


def planned_runs(args: argparse.Namespace) -> Iterable[Run]:
    """All runs, interleaved in rotating order. nginx takes longest, so it runs fewer seeds."""
    for turn, seed in enumerate(args.seeds):
        for cell in args.cells:
            rig, _, mix = cell.partition("/")
            for index in range(len(args.policies)):
                policy = args.policies[(index + turn) % len(args.policies)]
                if policy not in NGINX or turn < args.nginx_seeds:
                    yield Run(policy, rig, mix, seed, args.speed, args.seconds)


def format_run(run: Run, outcome: Measurement, repeats: dict[int, Report]) -> str:
    """Formats one run; `repeats`: its simulations."""
    made, shares = outcome.report, [one.in_time_share for one in repeats.values()]
    text = f"{run.cell:<16}seed {run.seed}  {run.policy:<18}in time {made.in_time_share:6.1%} of {made.requests}, "
    text += f"{made.in_ten_seconds_share:.1%} within 10 s"
    text += f" (simulated {mean_in_time(repeats):.1%}, {min(shares):.0%}-{max(shares):.0%}, "
    text += f"{mean(repeats, 'loaded_gb'):.0f} GB)"
    text += f"  {made.loads} loads, {made.loaded_gb:.0f} GB, {made.spills} spilled, {made.out_of_memory} OOM, "
    text += f"{made.errors} errors  ({made.seconds:.0f} emulated s, {outcome.real_seconds:.0f} s)"
    errors = sorted({one.error for one in outcome.answers if one.error})
    return "\n".join([text, *(f"    error: {error[:160]}" for error in errors[:3])]) + "\n"


def report_cell(cell: str, reports: Cell) -> int:
    """Prints a cell and its criteria. Returns the number of failed criteria."""
    rig, _, mix = cell.partition("/")
    sys.stdout.write("\n".join(format_cell(f"{cell}, {default_rate(rig, mix):.2f} requests/s", reports, _LABEL)) + "\n")
    failed = 0
    if ROUTER in reports and any(policy in reports for policy in STOCK_VERSIONS):
        for criterion, holds in criteria(Task(rig, mix, 1.0, ROUTER, 1), reports):
            sys.stdout.write(f"    {'PASS' if holds else 'FAIL'}  {criterion}\n")
            failed += not holds
    sys.stdout.flush()
    return failed


def main() -> int:
    """Returns 1 if a criterion fails."""
    args = _parse_arguments()
    if nginx() is None and set(NGINX) & set(args.policies):
        sys.stdout.write("skipping the nginx baselines: nginx is not installed (make nginx)\n")
        args.policies = [policy for policy in args.policies if policy not in NGINX]
    cells: dict[str, Cell] = {}
    rows: list[dict[str, object]] = []
    for run in planned_runs(args):
        outcome = play(run)
        repeats = in_simulator(run.policy, run, outcome.answers, _SIMULATIONS_PER_RUN)
        sys.stdout.write(format_run(run, outcome, repeats))
        sys.stdout.flush()
        cells.setdefault(run.cell, {}).setdefault(run.policy, {})[run.seed] = outcome.report
        if run.policy == ROUTER:
            (instant,) = in_simulator(FLOOR, run, outcome.answers).values()
            cells[run.cell].setdefault(FLOOR, {})[run.seed] = instant
        rows.append({"cell": run.cell, "policy": run.policy, "seed": run.seed, **outcome.report.as_dict(),
                     "simulated": [repeat.as_dict() for repeat in repeats.values()]})  # fmt: skip
        if args.out is not None:
            args.out.write_text(json.dumps({"emulated": True, "speed": run.speed, "runs": rows}, indent=1) + "\n")
    failed = sum(report_cell(cell, reports) for cell, reports in cells.items())
    sys.stdout.write(f"\n{failed} criteria failed\n")
    return 1 if failed else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), metavar="RIG/MIX")
    parser.add_argument("--policies", nargs="*", default=list(ALL), choices=ALL)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--nginx-seeds", type=int, default=1, help="number of seeds that the nginx baselines run")
    parser.add_argument("--speed", type=float, default=8.0, help="emulated seconds per real second")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="duration of arrivals, in emulated seconds")
    parser.add_argument("--out", type=Path, help="write the figures of every run to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
