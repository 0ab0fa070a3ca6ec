"""The whole matrix in the simulator: rigs x mixes x contestants x seeds, a table a cell, and the bars that must hold.

`make bench-sim` runs it; `--seeds 3 --cells 4x3090/team` is a quick look. Everything it prints is SIMULATED.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from router.cli.simulate import play
from router.lab.scenarios import MIXES, ScenarioSpec, default_rate, flood, make_baseline
from router.lab.simulator.metrics import Report, service_jain
from router.lab.simulator.runner import Simulation

RIGS = ("2x3090", "4090+3090", "4x3090", "2xa6000")
STOCK = ("stock-0.24", "stock-0.33", "spread-0.24", "spread-0.33")
OTHERS = (*STOCK, "nginx-round-robin", "nginx-least-conn")
OURS = "llamayard"
FLOOR = "floor"
BEST_PLAN = "best-plan"
_PLANNED_SEEDS = 3
"""For so many seeds a plan is searched for; that takes hundreds of runs."""
ALL = (FLOOR, BEST_PLAN, *OTHERS, OURS)
QUARTER = 0.25
_TIGHT_RIGS = ("2x3090", "4090+3090")
_FLOOD_FROM, _FLOOD_TO = 30.0, 300.0
_LEAST_JAIN = 0.95


@dataclass(frozen=True, slots=True)
class Task:
    rig: str
    mix: str
    factor: float
    """Times the rate that is set for rig and mix."""
    policy: str
    seed: int

    @property
    def cell(self) -> str:
        return f"{self.rig}/{self.mix}" + ("" if self.factor == 1 else f" at {self.factor:g} of the rate")


def one(task: Task) -> tuple[Task, Report]:
    rate = default_rate(task.rig, task.mix) * task.factor
    wanted = ScenarioSpec(task.rig, task.mix, task.seed, requests_per_second=rate)
    return task, play(task.policy, wanted, check=False).report


def tasks(seeds: int, cells: Iterable[str], policies: Iterable[str]) -> list[Task]:
    wanted = set(cells)
    return [
        Task(rig, mix, factor, policy, seed)
        for rig in RIGS
        for mix in MIXES
        for factor in (1.0, QUARTER)
        if not wanted or f"{rig}/{mix}" in wanted
        for policy in policies
        if factor == 1.0 or policy in (FLOOR, OURS, *STOCK[:2])
        for seed in range(1, (min(seeds, _PLANNED_SEEDS) if policy == BEST_PLAN else seeds) + 1)
    ]


Cell = dict[str, dict[int, Report]]
"""Policy -> seed -> report."""


def share(reports: dict[int, Report]) -> float:
    return statistics.fmean(report.in_time_share for report in reports.values())


def mean(reports: dict[int, Report], figure: str) -> float:
    """Of a figure by its name; `small.p95` looks into the waits."""
    head, _, tail = figure.partition(".")
    values = [getattr(report, head) for report in reports.values()]
    return statistics.fmean(float(getattr(value, tail) if tail else value) for value in values)


def show(name: str, cell: Cell, kind: str = "SIMULATED") -> list[str]:
    """`kind`: what the figures are of, since they are not of real servers."""
    lines = [f"\n{name}  ({kind}, {max(map(len, cell.values()))} seeds)"]
    lines.append(
        f"  {'policy':<18}{'in time, mean (min-max)':<26}{'one GPU p50/p95/p99':<24}{'several GPUs':<24}"
        f"{'tok/s':>6}{'GB':>7}{'spills':>7}{'OOM':>5}{'errors':>7}{'Jain':>6}  GPUs busy"
    )
    for policy, reports in cell.items():
        shares = [report.in_time_share for report in reports.values()]
        in_time = f"{share(reports):.1%} ({min(shares):.0%}-{max(shares):.0%})"
        small, large = (_waits(reports, kind) for kind in ("small", "large"))
        busy = [statistics.fmean(column) for column in zip(*(r.busy_shares for r in reports.values()), strict=True)]
        lines.append(
            f"  {policy:<18}{in_time:<26}{small:<24}{large:<24}"
            f"{mean(reports, 'tokens_per_second'):>6.0f}{mean(reports, 'loaded_gb'):>7.0f}"
            f"{mean(reports, 'spills'):>7.1f}{mean(reports, 'out_of_memory'):>5.1f}"
            f"{mean(reports, 'errors'):>7.1f}{mean(reports, 'jain'):>6.2f}  "
            + " ".join(f"{value:.0%}" for value in busy)
        )
    return lines


def _waits(reports: dict[int, Report], kind: str) -> str:
    return "/".join(f"{mean(reports, f'{kind}.{part}'):.1f}" for part in ("p50", "p95", "p99"))


def bars(task: Task, cell: Cell) -> list[tuple[str, bool]]:
    """Each bar in words, and whether it holds."""
    ours = cell[OURS]
    stock = max((cell[policy] for policy in STOCK if policy in cell), key=share)
    if task.factor != 1.0:
        return _quarter_bars(ours, cell)
    found: list[tuple[str, bool]] = []
    gap_ours, gap_stock = share(cell[FLOOR]) - share(ours), share(cell[FLOOR]) - share(stock)
    limit = 2 / 3 if task.rig in _TIGHT_RIGS else 1 / 2
    words = f"gap {gap_ours:.1%} <= {limit:.2f} x {gap_stock:.1%} of the best stock server"
    found.append((words, gap_ours <= max(limit * gap_stock, 0.0) + 1e-9))
    worst = max(
        max(cell[policy][seed].in_time_share for policy in OTHERS if seed in cell.get(policy, {}))
        - report.in_time_share
        for seed, report in ours.items()
    )
    found.append((f"worst seed {worst:+.1%} behind the best other <= 1.0%", worst <= 0.01 + 1e-9))
    if task.mix in ("team", "wide"):
        small, theirs = mean(ours, "small.p95"), mean(stock, "small.p95")
        found.append((f"one GPU: p95 {small:.1f} s <= a third of {theirs:.1f} s", small <= theirs / 3))
    large, theirs = mean(ours, "large.p95"), mean(stock, "large.p95")
    found.append((f"several GPUs: p95 {large:.1f} s <= {theirs:.1f} s", large <= theirs + 1e-9))
    if task.mix == "wide":
        loaded, theirs = mean(ours, "loaded_gb"), mean(stock, "loaded_gb")
        found.append((f"{loaded:.0f} GB loaded <= 2/3 of {theirs:.0f}", loaded <= theirs * 2 / 3))
    bad = {name: mean(ours, name) for name in ("spills", "out_of_memory", "errors")}
    found.append((f"no spill, no out-of-memory, no error: {bad}", not any(bad.values())))
    found.append((f"Jain {mean(ours, 'jain'):.3f} >= {_LEAST_JAIN}", mean(ours, "jain") >= _LEAST_JAIN))
    return found


def _quarter_bars(ours: dict[int, Report], cell: Cell) -> list[tuple[str, bool]]:
    """At a quarter of the rate nothing is worse than stock, first tokens included (within a tenth of a second)."""
    stock = [cell[policy] for policy in STOCK if policy in cell]
    best = max(share(reports) for reports in stock)
    found = [(f"in time {share(ours):.1%} >= {best:.1%}", share(ours) >= best - 1e-9)]
    for kind in ("small", "large"):
        for part in ("p50", "p95"):
            figure = f"{kind}.{part}"
            least = min(mean(reports, figure) for reports in stock)
            words = f"{figure} {mean(ours, figure):.2f} s <= {least:.2f} s"
            found.append((words, mean(ours, figure) <= least + 0.1))
    return found


def flooded() -> int:
    """Prints who is served how much while all always wait; 1 where the router is not fair then."""
    shares = {policy: _flood_jain(policy) for policy in (STOCK[0], OURS)}
    sys.stdout.write("\nflood, 3090: service between backlogged users, one with ten times the sessions  (SIMULATED)\n")
    sys.stdout.write("".join(f"  {policy:<18}Jain {value:.3f}\n" for policy, value in shares.items()))
    holds = shares[OURS] >= _LEAST_JAIN
    sys.stdout.write(f"    {'holds ' if holds else 'BROKEN'}  Jain {shares[OURS]:.3f} >= {_LEAST_JAIN}\n")
    return not holds


def _flood_jain(policy: str) -> float:
    scenario = flood(_FLOOD_TO)
    outcome = Simulation(scenario, make_baseline(policy, scenario)).run()
    return service_jain(outcome.requests, _FLOOD_FROM, _FLOOD_TO)


def main() -> int:
    """1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", nargs="*", default=[], metavar="RIG/MIX")
    parser.add_argument("--policies", nargs="*", default=list(ALL))
    parser.add_argument("--out", type=Path, help="where the figures of every run go, as JSON")
    given = parser.parse_args()
    wanted = tasks(given.seeds, given.cells, given.policies)
    cells: dict[str, Cell] = {}
    firsts: dict[str, Task] = {}
    rows: list[dict[str, object]] = []
    left = {task.cell: sum(other.cell == task.cell for other in wanted) for task in wanted}
    failed = 0
    with multiprocessing.Pool(given.jobs) as pool:
        for task, report in pool.imap(one, wanted, chunksize=2):
            firsts.setdefault(task.cell, task)
            cells.setdefault(task.cell, {}).setdefault(task.policy, {})[task.seed] = report
            rows.append({"cell": task.cell, "policy": task.policy, "seed": task.seed, **report.as_dict()})
            left[task.cell] -= 1
            if left[task.cell] == 0:
                failed += finish(firsts[task.cell], cells[task.cell])
    failed += flooded()
    if given.out is not None:
        given.out.write_text(json.dumps({"simulated": True, "runs": rows}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"\n{failed} bars do not hold\n")
    return 1 if failed else 0


def finish(task: Task, cell: Cell) -> int:
    """Prints a cell and its bars; how many do not hold."""
    sys.stdout.write(
        "\n".join(show(f"{task.cell}, {default_rate(task.rig, task.mix) * task.factor:.2f} requests/s", cell)) + "\n"
    )
    broken = 0
    if OURS in cell and FLOOR in cell and any(policy in cell for policy in STOCK):
        for words, holds in bars(task, cell):
            sys.stdout.write(f"    {'holds ' if holds else 'BROKEN'}  {words}\n")
            broken += not holds
    sys.stdout.flush()
    return broken


if __name__ == "__main__":
    sys.exit(main())
