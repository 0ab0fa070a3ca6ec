"""`llamayard simulate`: compares the router with other policies on simulated GPUs, in virtual time.

Prints a table or JSON and writes a JSON file and a picture per run. Needs no GPU, server or socket. All output is
marked as simulated.
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

from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.domain.model import ModelFacts
from router.lab.emulator.spec import SpecError
from router.lab.scenarios import (
    BASELINES,
    MIXES,
    ScenarioError,
    ScenarioSpec,
    demand_of,
    large_models,
    make_baseline,
    make_scenario,
)
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.fault_parser import FAULT_KINDS, FaultError, with_faults
from router.lab.simulator.invariants import Invariants
from router.lab.simulator.machine import Machine
from router.lab.simulator.metrics import Report, TtftPercentiles, report
from router.lab.simulator.record import record
from router.lab.simulator.runner import Baseline, Outcome, Simulation
from router.lab.simulator.workload import TRACE, TraceError, TraceRow

_DEFAULT_POLICIES = ("floor", "stock-0.24", "stock-0.33", "nginx-least-conn", "llamayard")
_NO_FILES = "-"


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run with its results."""

    policy: str
    spec: ScenarioSpec
    outcome: Outcome
    report: Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rig", default="4x3090", metavar="SPEC", help="GPUs: 4x3090, 4090+3090, 2xa6000, h100 or a file")
    add(
        "--mix",
        default="team",
        help=f"{', '.join(MIXES)}, or catalogue models with weights: llama3.1:8b,llama3.3:70b=2",
    )
    add("--trace", type=Path, default=TRACE, metavar="FILE", help="CSV of arrivals and tokens (default: built in)")
    add("--policy", action="append", metavar="NAME", help=f"{', '.join(BASELINES)}; repeatable")
    add("--seed", type=int, action="append", help="repeatable (default 1)")
    add("--seconds", type=float, help="duration of arrivals (default: 480, or until 120 requests)")
    add("--rate", type=float, default=None, help="requests per second (default: by rig and mix)")
    add("--users", type=int, default=12, help="default 12")
    add("--fault", action="append", default=[], metavar="FAULT",
        help=f"KIND@SECONDS[+SECONDS][:NUMBER][=AMOUNT], of {', '.join(FAULT_KINDS)}; repeatable")  # fmt: skip
    add("--check", action="store_true", help="check the router's invariants after every event")
    add("--cold", action="store_true", help="start with an empty page cache")
    add("--out", default="simulated", metavar="DIR", help=f"directory for JSON and pictures; {_NO_FILES} writes none")
    add("--json", action="store_true", help="print JSON instead of the table")


def _run(arguments: argparse.Namespace) -> int:
    try:
        runs = [
            play(policy, _spec(arguments, seed), check=arguments.check, faults=arguments.fault)
            for seed in arguments.seed or [1]
            for policy in arguments.policy or _DEFAULT_POLICIES
        ]  # fmt: skip
    except (FaultError, ScenarioError, SpecError, TraceError) as error:
        sys.stderr.write(f"llamayard: {error}\n")
        return EXIT_MISUSED
    if arguments.json:
        document = {"simulated": True, "notes": notes(runs), "runs": [_summary(run) for run in runs]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        lines = "".join(f"{note}\n" for note in notes(runs))
        sys.stdout.write(f"SIMULATED {arguments.rig}, mix {arguments.mix}\n{table(runs)}{lines}")
    if arguments.out == _NO_FILES:
        return EXIT_OK
    try:
        _write(runs, Path(arguments.out))
    except OSError as error:
        sys.stderr.write(f"llamayard: out: {arguments.out}: {error.strerror}; --out {_NO_FILES} writes no files\n")
        return EXIT_MISUSED
    return EXIT_OK


def _spec(arguments: argparse.Namespace, seed: int) -> ScenarioSpec:
    return ScenarioSpec(
        arguments.rig, arguments.mix, seed, arguments.seconds, arguments.rate, arguments.users, arguments.trace,
        arguments.cold,
    )  # fmt: skip


def play(
    policy: str,
    spec: ScenarioSpec,
    rows: tuple[TraceRow, ...] | None = None,
    *,
    check: bool = False,
    faults: Iterable[str] = (),
) -> RunResult:
    """One run. `check`: an InvariantError as soon as the router breaks a rule."""
    scenario = with_faults(make_scenario(spec, rows), faults)
    rules = Invariants()
    make = make_baseline(policy, scenario, observer=rules.check_actions if check else None)

    def watched(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        made = make(machine, models)
        if check and isinstance(made, Llamayard):
            rules.watch(made, machine)
        return made

    outcome = Simulation(scenario, watched).run(rules.check_state)
    return RunResult(policy, spec, outcome, report(outcome, large_models(scenario)))


def table(runs: list[RunResult]) -> str:
    """One line per run."""
    head = (
        f"{'policy':<18}{'seed':>5}{'requests':>9}{'in time':>9}{'errors':>7}  {'TTFT one GPU':<22}"
        f"{'several GPUs':<22}{'tok/s':>6}{'GB':>6}{'spills':>7}{'OOM':>4}{'Jain':>6}  GPUs busy"
    )
    return "\n".join([head, *(_line(run.policy, run.spec.seed, run.report) for run in runs)]) + "\n"


def _line(policy: str, seed: int, result: Report) -> str:
    busy = " ".join(f"{share:.0%}" for share in result.busy_shares)
    return (
        f"{policy:<18}{seed:>5}{result.requests:>9}{result.in_time_share:>9.1%}{result.errors:>7}  "
        f"{_waits(result.small):<22}{_waits(result.large):<22}{result.tokens_per_second:>6.0f}"
        f"{result.loaded_gb:>6.0f}{result.spills:>7}{result.out_of_memory:>4}{result.jain:>6.2f}  {busy}"
    )


def notes(runs: Iterable[RunResult]) -> list[str]:
    """A sentence for each seed whose trace has too few requests."""
    by_seed: dict[int, str] = {}
    for run in runs:
        demand, available = demand_of(run.spec), run.outcome.planned
        if available < demand.requests:
            by_seed[run.spec.seed] = (
                f"seed {run.spec.seed}: the trace has {available} requests for {demand.seconds:g} s "
                f"({available / demand.seconds:.2f} per second), fewer than the requested {demand.requests} "
                f"({demand.requests_per_second:g} per second)"
            )
    return list(by_seed.values())


def _waits(waits: TtftPercentiles) -> str:
    """p50/p95/p99 in seconds."""
    return f"{waits.p50:.1f}/{waits.p95:.1f}/{waits.p99:.1f}" if waits.count else "-"


def _summary(run: RunResult) -> dict[str, object]:
    return {"policy": run.policy, "rig": run.spec.rig, "mix": run.spec.mix, "seed": run.spec.seed,
            **run.report.as_dict()}  # fmt: skip


def _write(runs: list[RunResult], folder: Path) -> None:
    """Writes a JSON file and a picture per run."""
    folder.mkdir(parents=True, exist_ok=True)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    for run in runs:
        spec = run.spec
        name = f"{spec.rig}-{spec.mix}-{run.policy}-{spec.seed}".replace("/", "_").replace(":", "_")
        title = f"SIMULATED {spec.rig}, {spec.mix}, {run.policy}, seed {spec.seed}: "
        title += f"{run.report.in_time_share:.0%} in time, {run.report.loaded_gb:.0f} GB loaded"
        path = folder / f"{name}.json"
        data = {"simulated": True, "title": title, "summary": _summary(run), "run": record(run.outcome)}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        if has_matplotlib:
            command = [sys.executable, "-m", "router.lab.plot", str(path), str(path.with_suffix(".svg"))]
            subprocess.run(command, check=True)
    if not has_matplotlib:
        sys.stderr.write("llamayard: no pictures without matplotlib: pip install 'llamayard[sim]'\n")


def main(arguments: Sequence[str]) -> int:
    """Runs the simulations and prints the results; returns EXIT_MISUSED for wrong arguments."""
    parser = argparse.ArgumentParser(prog="llamayard simulate")
    _add_arguments(parser)
    return _run(parser.parse_args(arguments))
