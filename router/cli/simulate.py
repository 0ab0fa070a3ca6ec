"""`llamayard simulate`: the router and its rivals over simulated GPUs, in virtual time, as a table, a JSON, a picture.

No GPU, no server and no socket is needed. Everything it prints is simulated, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router.domain.model import ModelFacts
from router.lab.emulator.spec import SpecError
from router.lab.scenarios import (
    BASELINES,
    MIXES,
    ScenarioError,
    ScenarioSpec,
    baseline,
    demand_of,
    large_models,
    scenario,
)
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.fault_parser import WORDS, FaultError, with_faults
from router.lab.simulator.invariants import Invariants
from router.lab.simulator.machine import Host
from router.lab.simulator.metrics import Report, Waits, report
from router.lab.simulator.record import record
from router.lab.simulator.runner import Baseline, Outcome, Simulation
from router.lab.simulator.workload import TRACE, TraceError, TraceRow

_DEFAULT = ("floor", "stock-0.24", "stock-0.33", "nginx-least-conn", "llamayard")
_NO_FILES = "-"


@dataclass(frozen=True, slots=True)
class Played:
    """One run with its figures."""

    policy: str
    wanted: ScenarioSpec
    outcome: Outcome
    report: Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("--rig", default="4x3090", metavar="SPEC", help="gpus: 4x3090, 4090+3090, 2xa6000, h100 or a file")
    add("--mix", default="team", help=f"{', '.join(MIXES)}, or models of the catalogue: llama3.1:8b,llama3.3:70b=2")
    add("--trace", type=Path, default=TRACE, metavar="FILE", help="CSV of arrivals and tokens (else a built-in one)")
    add("--policy", action="append", metavar="NAME", help=f"of: {', '.join(BASELINES)}; repeatable")
    add("--seed", type=int, action="append", help="repeatable (default 1)")
    add("--seconds", type=float, help="how long requests arrive (default: 480, or until there are 120)")
    add("--rate", type=float, default=None, help="requests a second (default: by rig and mix)")
    add("--users", type=int, default=12)
    add("--fault", action="append", default=[], metavar="FAULT",
        help=f"KIND@SECONDS[+SECONDS][:NUMBER][=AMOUNT], of {', '.join(WORDS)}; repeatable")  # fmt: skip
    add("--check", action="store_true", help="hold the router to its rules after everything that happens")
    add("--cold", action="store_true", help="no model is in the page cache at the start")
    add("--out", default="simulated", metavar="DIR", help=f"where JSON and picture go; {_NO_FILES} writes none")
    add("--json", action="store_true", help="print JSON instead of the table")


def _run(given: argparse.Namespace) -> int:
    try:
        runs = [
            play(policy, _wanted(given, seed), check=given.check, faults=given.fault)
            for seed in given.seed or [1]
            for policy in given.policy or _DEFAULT
        ]  # fmt: skip
    except (FaultError, ScenarioError, SpecError, TraceError) as error:
        sys.stderr.write(f"llamayard: {error}\n")
        return 2
    if given.json:
        told = {"simulated": True, "notes": notes(runs), "runs": [_summary(one) for one in runs]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    else:
        lines = "".join(f"{note}\n" for note in notes(runs))
        sys.stdout.write(f"SIMULATED {given.rig}, mix {given.mix}\n{table(runs)}{lines}")
    if given.out == _NO_FILES:
        return 0
    try:
        _write(runs, Path(given.out))
    except OSError as error:
        sys.stderr.write(f"llamayard: out: {given.out}: {error.strerror}; --out {_NO_FILES} writes no files\n")
        return 2
    return 0


def _wanted(given: argparse.Namespace, seed: int) -> ScenarioSpec:
    return ScenarioSpec(given.rig, given.mix, seed, given.seconds, given.rate, given.users, given.trace, given.cold)


def play(
    policy: str,
    wanted: ScenarioSpec,
    rows: tuple[TraceRow, ...] | None = None,
    *,
    check: bool = False,
    faults: Iterable[str] = (),
) -> Played:
    """One run. `check`: an InvariantError as soon as the router breaks a rule."""
    scene = with_faults(scenario(wanted, rows), faults)
    rules = Invariants()
    make = baseline(policy, scene, seen=rules.seen if check else None)

    def watched(host: Host, models: Mapping[str, ModelFacts]) -> Baseline:
        made = make(host, models)
        if check and isinstance(made, Llamayard):
            rules.watch(made, host)
        return made

    outcome = Simulation(scene, watched).run(rules.after_each)
    return Played(policy, wanted, outcome, report(outcome, large_models(scene)))


def table(runs: list[Played]) -> str:
    """One line a run, in-time share first."""
    head = (
        f"{'policy':<18}{'seed':>5}{'requests':>9}{'in time':>9}{'errors':>7}  {'TTFT one GPU':<22}"
        f"{'several GPUs':<22}{'tok/s':>6}{'GB':>6}{'spills':>7}{'OOM':>4}{'Jain':>6}  GPUs busy"
    )
    return "\n".join([head, *(_line(one.policy, one.wanted.seed, one.report) for one in runs)]) + "\n"


def _line(policy: str, seed: int, result: Report) -> str:
    busy = " ".join(f"{share:.0%}" for share in result.busy_shares)
    return (
        f"{policy:<18}{seed:>5}{result.requests:>9}{result.in_time_share:>9.1%}{result.errors:>7}  "
        f"{_waits(result.small):<22}{_waits(result.large):<22}{result.tokens_per_second:>6.0f}"
        f"{result.loaded_gb:>6.0f}{result.spills:>7}{result.out_of_memory:>4}{result.jain:>6.2f}  {busy}"
    )


def notes(runs: Iterable[Played]) -> list[str]:
    """A sentence for each seed for which the trace has too few requests."""
    found: dict[int, str] = {}
    for one in runs:
        demand, there = demand_of(one.wanted), one.outcome.planned
        if there < demand.requests:
            found[one.wanted.seed] = (
                f"seed {one.wanted.seed}: the trace has {there} requests for {demand.seconds:g} s "
                f"({there / demand.seconds:.2f} a second), fewer than the {demand.requests} "
                f"({demand.requests_per_second:g} a second) that were asked for"
            )
    return list(found.values())


def _waits(waits: Waits) -> str:
    """p50/p95/p99 in seconds."""
    return f"{waits.p50:.1f}/{waits.p95:.1f}/{waits.p99:.1f}" if waits.count else "-"


def _summary(one: Played) -> dict[str, object]:
    return {"policy": one.policy, "rig": one.wanted.rig, "mix": one.wanted.mix, "seed": one.wanted.seed,
            **one.report.as_dict()}  # fmt: skip


def _write(runs: list[Played], folder: Path) -> None:
    """A JSON and a picture a run."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = importlib.util.find_spec("matplotlib") is not None
    for one in runs:
        name = f"{one.wanted.rig}-{one.wanted.mix}-{one.policy}-{one.wanted.seed}".replace("/", "_").replace(":", "_")
        title = f"SIMULATED {one.wanted.rig}, {one.wanted.mix}, {one.policy}, seed {one.wanted.seed}: "
        title += f"{one.report.in_time_share:.0%} in time, {one.report.loaded_gb:.0f} GB loaded"
        path = folder / f"{name}.json"
        data = {"simulated": True, "title": title, "summary": _summary(one), "run": record(one.outcome)}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        if draws:
            command = [sys.executable, "-m", "router.lab.plot", str(path), str(path.with_suffix(".svg"))]
            subprocess.run(command, check=True)
    if not draws:
        sys.stderr.write("llamayard: no pictures without matplotlib: pip install 'llamayard[sim]'\n")


def main(words: Sequence[str]) -> int:
    """Plays what the command's arguments ask for and prints it; 2 for a mistake in the asking."""
    parser = argparse.ArgumentParser(prog="llamayard simulate")
    _add_arguments(parser)
    return _run(parser.parse_args(words))
