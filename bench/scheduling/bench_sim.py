"""Benchmarks the router and its baselines in the simulator: rigs x mixes x policies x seeds, with acceptance criteria.

`make bench-sim`; `--seeds 3 --cells 4x3090/team` is a quick run. Everything it prints is SIMULATED.

When models thrash, one different load changes everything after it. `--shifts 4` plays each seed four more times, with
each request up to a second later, and counts the mean: a change of the router shows with fewer seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from router.lab.scenarios import (
    INSTANT_SWAPS,
    MIXES,
    ScenarioSpec,
    default_rate,
    flood,
    in_world_of,
    large_models,
    make_baseline,
    make_scenario,
)
from router.lab.simulator.metrics import Report, mean_report, report, service_jain
from router.lab.simulator.runner import Scenario, Simulation
from router.lab.simulator.workload import Session

RIGS = ("2x3090", "4090+3090", "4x3090", "2xa6000")
STOCK = ("stock-0.24", "stock-0.33", "spread-0.24", "spread-0.33")
BASELINES = (*STOCK, "nginx-round-robin", "nginx-least-conn")
ROUTER = "llamayard"
FLOOR = INSTANT_SWAPS
BEST_PLAN = "best-plan"
_PLANNED_SEEDS = 3
"""Number of seeds for best-plan; each search takes hundreds of simulations."""
ALL = (FLOOR, BEST_PLAN, *BASELINES, ROUTER)
QUARTER = 0.25
_TIGHT_RIGS = ("2x3090", "4090+3090")
_FLOOD_FROM, _FLOOD_TO = 30.0, 300.0
_MINIMUM_JAIN = 0.95


@dataclass(frozen=True, slots=True)
class Task:
    rig: str
    mix: str
    factor: float
    """Multiple of the default rate of the rig and mix."""
    policy: str
    seed: int
    shifts: int = 0
    """Further runs of the seed, with each request up to a second later."""

    @property
    def cell(self) -> str:
        return f"{self.rig}/{self.mix}" + ("" if self.factor == 1 else f" at {self.factor:g} of the rate")


def run_task(task: Task) -> tuple[Task, Report]:
    rate = default_rate(task.rig, task.mix) * task.factor
    selected = ScenarioSpec(task.rig, task.mix, task.seed, requests_per_second=rate)
    scenario = in_world_of(task.policy, make_scenario(selected))
    return task, mean_report([_play(task.policy, shifted(scenario, number)) for number in range(task.shifts + 1)])


def _play(policy: str, scenario: Scenario) -> Report:
    return report(Simulation(scenario, make_baseline(policy, scenario)).run(), large_models(scenario))


def shifted(scenario: Scenario, number: int) -> Scenario:
    """The scenario with each request up to a second later, at random; 0: unchanged."""
    return replace(scenario, sessions=delay_arrivals(scenario.sessions, number)) if number else scenario


def delay_arrivals(sessions: Iterable[Session], number: int) -> tuple[Session, ...]:
    """Delays each turn by a random time up to one second; `number` is the random seed."""
    rng = random.Random(number)
    return tuple(
        replace(one, turns=tuple(replace(turn, at_seconds=turn.at_seconds + rng.random()) for turn in one.turns))
        for one in sessions
    )


def tasks(
    seeds: int, cells: Iterable[str], policies: Iterable[str], first_seed: int = 1, shifts: int = 0
) -> list[Task]:
    selected = set(cells)
    return [
        Task(rig, mix, factor, policy, seed, 0 if policy == BEST_PLAN else shifts)
        for rig in RIGS
        for mix in MIXES
        for factor in (1.0, QUARTER)
        if not selected or f"{rig}/{mix}" in selected
        for policy in policies
        if factor == 1.0 or policy in (FLOOR, ROUTER, *STOCK[:2])
        for seed in range(first_seed, first_seed + (min(seeds, _PLANNED_SEEDS) if policy == BEST_PLAN else seeds))
    ]


Cell = dict[str, dict[int, Report]]
"""Policy -> seed -> report."""


def mean_in_time(reports: dict[int, Report]) -> float:
    return statistics.fmean(report.in_time_share for report in reports.values())


def mean(reports: dict[int, Report], figure: str) -> float:
    """Mean of a figure by name, such as `small.p95`, a percentile of the time to first token."""
    head, _, tail = figure.partition(".")
    values = [getattr(report, head) for report in reports.values()]
    return statistics.fmean(float(getattr(value, tail) if tail else value) for value in values)


def format_cell(name: str, cell: Cell, kind: str = "SIMULATED") -> list[str]:
    """Formats a cell as a table; `kind` says where the figures come from (simulated or emulated servers)."""
    lines = [f"\n{name}  ({kind}, {max(map(len, cell.values()))} seeds)"]
    lines.append(
        f"  {'policy':<18}{'in time, mean (min-max)':<25}{'10 s':<7}{'one GPU: in time, 10 s, p50/p95/p99':<37}"
        f"{'several GPUs':<37}"
        f"{'tok/s':>6}{'GB':>7}{'spills':>7}{'OOM':>5}{'errors':>7}{'Jain':>6}  GPUs busy"
    )
    for policy, reports in cell.items():
        shares = [report.in_time_share for report in reports.values()]
        in_time = f"{mean_in_time(reports):.1%} ({min(shares):.0%}-{max(shares):.0%})"
        small, large = (_class(reports, kind) for kind in ("small", "large"))
        busy = [statistics.fmean(column) for column in zip(*(r.busy_shares for r in reports.values()), strict=True)]
        lines.append(
            f"  {policy:<18}{in_time:<25}{mean(reports, 'in_ten_seconds_share'):<7.1%}{small:<37}{large:<37}"
            f"{mean(reports, 'tokens_per_second'):>6.0f}{mean(reports, 'loaded_gb'):>7.0f}"
            f"{mean(reports, 'spills'):>7.1f}{mean(reports, 'out_of_memory'):>5.1f}"
            f"{mean(reports, 'errors'):>7.1f}{mean(reports, 'jain'):>6.2f}  "
            + " ".join(f"{value:.0%}" for value in busy)
        )
    return lines


def _class(reports: dict[int, Report], kind: str) -> str:
    """Figures of a class of models, `small` or `large`."""
    if not mean(reports, f"{kind}.count"):
        return "-"
    shares = (mean(reports, f"{kind}_punctuality.{part}_share") for part in ("in_time", "in_ten_seconds"))
    waits = "/".join(f"{mean(reports, f'{kind}.{part}'):.1f}" for part in ("p50", "p95", "p99"))
    return " ".join([*(f"{share:.1%}" for share in shares), waits])


def criteria(task: Task, cell: Cell) -> list[tuple[str, bool]]:
    """The acceptance criteria of a cell: (text, whether it holds)."""
    ours = cell[ROUTER]
    stock = max((cell[policy] for policy in STOCK if policy in cell), key=mean_in_time)
    if task.factor != 1.0:
        return _quarter_rate_criteria(ours, cell)
    results: list[tuple[str, bool]] = []
    gap_ours, gap_stock = (
        mean_in_time(cell[FLOOR]) - mean_in_time(ours),
        mean_in_time(cell[FLOOR]) - mean_in_time(stock),
    )
    limit = 2 / 3 if task.rig in _TIGHT_RIGS else 1 / 2
    text = f"gap to instant swaps {gap_ours:.1%} <= {limit:.2f} x {gap_stock:.1%} of the best stock server"
    results.append((text, gap_ours <= max(limit * gap_stock, 0.0) + 1e-9))
    worst = max(
        max(cell[policy][seed].in_time_share for policy in BASELINES if seed in cell.get(policy, {}))
        - report.in_time_share
        for seed, report in ours.items()
    )
    results.append((f"worst seed: {worst:+.1%} behind the best baseline <= 1.0%", worst <= 0.01 + 1e-9))
    if task.mix in ("team", "wide"):
        small, theirs = mean(ours, "small.p95"), mean(stock, "small.p95")
        results.append((f"one GPU: TTFT p95 {small:.1f} s <= 1/3 of {theirs:.1f} s", small <= theirs / 3))
    large, theirs = mean(ours, "large.p95"), mean(stock, "large.p95")
    results.append((f"several GPUs: TTFT p95 {large:.1f} s <= {theirs:.1f} s", large <= theirs + 1e-9))
    if task.mix == "wide":
        loaded, theirs = mean(ours, "loaded_gb"), mean(stock, "loaded_gb")
        results.append((f"{loaded:.0f} GB loaded <= 2/3 of {theirs:.0f}", loaded <= theirs * 2 / 3))
    failures = {name: mean(ours, name) for name in ("spills", "out_of_memory", "errors")}
    results.append((f"no spill, no out-of-memory, no error: {failures}", not any(failures.values())))
    results.append((f"Jain {mean(ours, 'jain'):.3f} >= {_MINIMUM_JAIN}", mean(ours, "jain") >= _MINIMUM_JAIN))
    return results


def _quarter_rate_criteria(ours: dict[int, Report], cell: Cell) -> list[tuple[str, bool]]:
    """At a quarter of the rate nothing is worse than stock; TTFT within a tenth of a second."""
    stock = [cell[policy] for policy in STOCK if policy in cell]
    best = max(mean_in_time(reports) for reports in stock)
    results = [(f"in time {mean_in_time(ours):.1%} >= {best:.1%}", mean_in_time(ours) >= best - 1e-9)]
    for kind in ("small", "large"):
        for part in ("p50", "p95"):
            figure = f"{kind}.{part}"
            best_stock = min(mean(reports, figure) for reports in stock)
            text = f"TTFT {figure} {mean(ours, figure):.2f} s <= {best_stock:.2f} s"
            results.append((text, mean(ours, figure) <= best_stock + 0.1))
    return results


def check_flood_fairness() -> int:
    """Prints the service fairness between backlogged users. Returns whether the router fails the criterion."""
    shares = {policy: _flood_jain(policy) for policy in (STOCK[0], ROUTER)}
    sys.stdout.write("\nflood, 3090: fairness between backlogged users, one with ten times the sessions  (SIMULATED)\n")
    sys.stdout.write("".join(f"  {policy:<18}Jain {value:.3f}\n" for policy, value in shares.items()))
    holds = shares[ROUTER] >= _MINIMUM_JAIN
    sys.stdout.write(f"    {'PASS' if holds else 'FAIL'}  Jain {shares[ROUTER]:.3f} >= {_MINIMUM_JAIN}\n")
    return not holds


def _flood_jain(policy: str) -> float:
    scenario = flood(_FLOOD_TO)
    outcome = Simulation(scenario, make_baseline(policy, scenario)).run()
    return service_jain(outcome.requests, _FLOOD_FROM, _FLOOD_TO)


def main() -> int:
    """Returns 1 if a criterion fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--shifts", type=int, default=0, help="further runs of each seed, with slightly later requests")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", nargs="*", default=[], metavar="RIG/MIX")
    parser.add_argument("--policies", nargs="*", default=list(ALL))
    parser.add_argument("--out", type=Path, help="write the figures of every run to this JSON file")
    args = parser.parse_args()
    selected = tasks(args.seeds, args.cells, args.policies, args.first_seed, args.shifts)
    cells: dict[str, Cell] = {}
    first_tasks: dict[str, Task] = {}
    rows: list[dict[str, object]] = []
    remaining = {task.cell: sum(other.cell == task.cell for other in selected) for task in selected}
    failed = 0
    with multiprocessing.Pool(args.jobs) as pool:
        for task, report in pool.imap(run_task, selected, chunksize=2):
            first_tasks.setdefault(task.cell, task)
            cells.setdefault(task.cell, {}).setdefault(task.policy, {})[task.seed] = report
            rows.append({"cell": task.cell, "policy": task.policy, "seed": task.seed, **report.as_dict()})
            remaining[task.cell] -= 1
            if remaining[task.cell] == 0:
                failed += report_cell(first_tasks[task.cell], cells[task.cell])
    failed += check_flood_fairness()
    if args.out is not None:
        args.out.write_text(json.dumps({"simulated": True, "runs": rows}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"\n{failed} criteria failed\n")
    return 1 if failed else 0


def report_cell(task: Task, cell: Cell) -> int:
    """Prints a cell and its criteria. Returns the number of failed criteria."""
    rate = default_rate(task.rig, task.mix) * task.factor
    sys.stdout.write("\n".join(format_cell(f"{task.cell}, {rate:.2f} requests/s", cell)) + "\n")
    failed_criteria = 0
    if ROUTER in cell and FLOOR in cell and any(policy in cell for policy in STOCK):
        for criterion, holds in criteria(task, cell):
            sys.stdout.write(f"    {'PASS' if holds else 'FAIL'}  {criterion}\n")
            failed_criteria += not holds
    sys.stdout.flush()
    return failed_criteria


if __name__ == "__main__":
    sys.exit(main())
