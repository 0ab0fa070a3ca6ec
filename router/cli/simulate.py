"""`llamayard simulate`: compares the router with other policies on simulated GPUs, in virtual time.

Prints a table or JSON; with `--output`, writes a JSON file and a picture per run. Needs no GPU, server or
socket. All output is marked as simulated.
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

from router.cli.configuration import print_problems, set_flags
from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.cli.simulate_settings import server_config, simulated_policy
from router.config.settings import ConfigError, Settings, load_settings
from router.domain.model import ModelFacts
from router.lab.emulator.spec import SpecError
from router.lab.scenarios import (
    BASELINES,
    MIXES,
    ScenarioError,
    ScenarioSpec,
    demand_of,
    in_world_of,
    large_models,
    make_baseline,
    make_scenario,
)
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.fault_parser import FAULT_KINDS, FaultError, with_faults
from router.lab.simulator.gpus import GpuLedger
from router.lab.simulator.invariants import Invariants
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.metrics import Punctuality, Report, TtftPercentiles, mean_report, report
from router.lab.simulator.record import record
from router.lab.simulator.runner import Baseline, Outcome, Simulation
from router.lab.simulator.workload import TRACE, TraceError, TraceRow

_DEFAULT_POLICIES = ("instant-swaps", "stock-0.24", "stock-0.33", "nginx-least-conn", "llamayard")
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
    add("--output", "--out", metavar="DIR", help="write a JSON file and a picture of each run there (default: none)")
    add("--config", type=Path, metavar="FILE", help="YAML file whose settings the router and the servers get")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. queue.limit=64; repeatable")
    add("--exact", action="store_true", help="each load takes exactly its usual size, and memory is free at once")
    add("--json", action="store_true", help="print JSON instead of the table")


def _run(arguments: argparse.Namespace) -> int:
    try:
        settings = _settings(arguments)
        runs = [
            play(policy, _spec(arguments, seed), check=arguments.check, faults=arguments.fault, settings=settings)
            for seed in arguments.seed or [1]
            for policy in arguments.policy or _DEFAULT_POLICIES
        ]  # fmt: skip
    except (FaultError, ScenarioError, SpecError, TraceError) as error:
        print_problems([str(error)])
        return EXIT_MISUSED
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    if arguments.json:
        document = {
            "simulated": True,
            "notes": notes(runs),
            "runs": [_summary(run) for run in runs],
            "means": {policy: report.as_dict() for policy, report in means(runs).items()},
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        lines = "".join(f"{note}\n" for note in notes(runs))
        sys.stdout.write(f"SIMULATED {arguments.rig}, mix {arguments.mix}\n{table(runs)}{lines}")
    if arguments.output in (None, _NO_FILES):
        return EXIT_OK
    try:
        _write(runs, Path(arguments.output))
    except OSError as error:
        print_problems([f"--output {arguments.output}: cannot be written: {error.strerror}"])
        return EXIT_MISUSED
    return EXIT_OK


def _settings(arguments: argparse.Namespace) -> Settings | None:
    """The settings of `--config` and `--set`; None without them. The environment is not read.

    Raises:
        ConfigError: they cannot be used.
    """
    if arguments.config is None and not arguments.set:
        return None
    return load_settings(arguments.config, {}, set_flags(arguments.set))


def _spec(arguments: argparse.Namespace, seed: int) -> ScenarioSpec:
    return ScenarioSpec(
        arguments.rig, arguments.mix, seed, arguments.seconds, arguments.rate, arguments.users, arguments.trace,
        arguments.cold, not arguments.exact,
    )  # fmt: skip


def play(
    policy: str,
    spec: ScenarioSpec,
    rows: tuple[TraceRow, ...] | None = None,
    *,
    check: bool = False,
    faults: Iterable[str] = (),
    settings: Settings | None = None,
) -> RunResult:
    """One run. `check`: an InvariantError as soon as the router breaks a rule.

    Raises:
        ConfigError: the settings do not fit the simulated GPUs.
    """
    scenario = in_world_of(policy, with_faults(make_scenario(spec, rows), faults))
    rules = Invariants()
    config = ServerConfig() if settings is None else server_config(settings)
    make = make_baseline(
        policy,
        scenario,
        policy=None if settings is None else simulated_policy(settings, GpuLedger(scenario.gpus).read()),
        observer=rules.check_actions if check else None,
        config=config,
    )

    def watched(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        made = make(machine, models)
        if check and isinstance(made, Llamayard):
            rules.watch(made, machine)
        return made

    outcome = Simulation(scenario, watched).run(rules.check_state)
    return RunResult(policy, spec, outcome, report(outcome, large_models(scenario)))


def means(runs: Iterable[RunResult]) -> dict[str, Report]:
    """The mean over the seeds of each policy that ran with several."""
    by_policy: dict[str, list[Report]] = {}
    for run in runs:
        by_policy.setdefault(run.policy, []).append(run.report)
    return {policy: mean_report(reports) for policy, reports in by_policy.items() if len(reports) > 1}


def table(runs: list[RunResult]) -> str:
    """One line per run, then one with the means of each policy that ran with several seeds."""
    head = (
        f"{'policy':<18}{'seed':>5}{'requests':>9}{'in time':>9}{'10 s':>7}{'refused':>8}{'failed':>7}  "
        f"{'one GPU: in time, 10 s, TTFT':<30}{'several GPUs':<30}"
        f"{'tok/s':>6}{'GB':>6}{'spills':>7}{'OOM':>4}{'Jain':>6}  GPUs busy"
    )
    lines = [_line(run.policy, str(run.spec.seed), run.report) for run in runs]
    lines += [_line(policy, "mean", report) for policy, report in means(runs).items()]
    return "\n".join([head, *lines]) + "\n"


def _line(policy: str, seed: str, result: Report) -> str:
    busy = " ".join(f"{share:.0%}" for share in result.busy_shares)
    return (
        f"{policy:<18}{seed:>5}{result.requests:>9.5g}{result.in_time_share:>9.1%}{result.in_ten_seconds_share:>7.1%}"
        f"{result.refused:>8.4g}{result.failed:>7.4g}  {_class(result.small_punctuality, result.small):<30}"
        f"{_class(result.large_punctuality, result.large):<30}{result.tokens_per_second:>6.0f}"
        f"{result.loaded_gb:>6.0f}{result.spills:>7.4g}{result.out_of_memory:>4.3g}{result.jain:>6.2f}  {busy}"
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


def _class(shares: Punctuality, waits: TtftPercentiles) -> str:
    """Shares in time and within 10 s, then p50/p95/p99 in seconds."""
    if not waits.count:
        return "-"
    text = f"{waits.p50:.1f}/{waits.p95:.1f}/{waits.p99:.1f}"
    return f"{shares.in_time_share:.0%} {shares.in_ten_seconds_share:.0%} {text}"


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
        print_problems(["no pictures without matplotlib: pip install 'llamayard[sim]'"])


def main(arguments: Sequence[str]) -> int:
    """Runs the simulations and prints the results; returns EXIT_MISUSED for wrong arguments."""
    parser = argparse.ArgumentParser(prog="llamayard simulate")
    _add_arguments(parser)
    return _run(parser.parse_args(arguments))
