"""`llamayard simulate`: the router and its rivals over simulated cards, in virtual time, as a table, a JSON, a picture.

No card, no server and no socket is needed. Everything it prints is simulated, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from router.rig.spec import SpecError
from router.scenarios import (
    CONTESTANTS,
    MIXES,
    ScenarioError,
    Wanted,
    contestant,
    large_models,
    scenario,
)
from router.sim.metrics import Report, Waits, report
from router.sim.runner import Simulation
from router.sim.workload import TRACE, TraceError

_DEFAULT = ("floor", "stock-0.24", "stock-0.33", "nginx-least-conn", "llamayard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rig", default="4x3090", metavar="SPEC", help="cards: 4x3090, 4090+3090, 2xa6000 or a file")
    parser.add_argument("--mix", default="team", help=f"{', '.join(MIXES)}, or models of the catalogue: a:8b,b:70b=2")
    parser.add_argument(
        "--trace", type=Path, default=TRACE, metavar="FILE", help="CSV of arrivals (else a built-in one)"
    )
    parser.add_argument("--policy", action="append", metavar="NAME", help=f"of: {', '.join(CONTESTANTS)}; repeatable")
    parser.add_argument("--seed", type=int, action="append", help="repeatable (default 1)")
    parser.add_argument("--seconds", type=float, default=480.0, help="how long requests arrive (default 480)")
    parser.add_argument("--rate", type=float, default=1.0, help="times 0.46 requests a second (default 1)")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--cold", action="store_true", help="no model is in the page cache at the start")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(given: argparse.Namespace) -> int:
    """Plays what is asked for and prints it; 2 for a mistake in the asking."""
    try:
        rows = [
            (policy, seed, play(policy, _wanted(given, seed)))
            for seed in given.seed or [1]
            for policy in given.policy or _DEFAULT
        ]
    except (ScenarioError, SpecError, TraceError) as error:
        sys.stderr.write(f"llamayard: {error}\n")
        return 2
    if given.json:
        data = [{"policy": policy, "seed": seed, **result.as_dict()} for policy, seed, result in rows]
        sys.stdout.write(json.dumps({"simulated": True, "runs": data}, indent=2) + "\n")
        return 0
    sys.stdout.write(f"SIMULATED {given.rig}, mix {given.mix}, {given.seconds:g} s, rate x{given.rate:g}\n")
    sys.stdout.write(table(rows))
    return 0


def _wanted(given: argparse.Namespace, seed: int) -> Wanted:
    return Wanted(given.rig, given.mix, seed, given.seconds, given.rate, given.users, given.trace, given.cold)


def play(policy: str, wanted: Wanted) -> Report:
    """One run."""
    scene = scenario(wanted)
    outcome = Simulation(scene, contestant(policy)).run()
    return report(outcome, large_models(scene))


def table(rows: list[tuple[str, int, Report]]) -> str:
    head = (
        f"{'policy':<18}{'seed':>5}{'reqs':>6}{'in time':>9}{'errors':>7}  {'one card p50/95/99':<20}"
        f"{'several cards':<20}{'tok/s':>6}{'GB':>7}{'spills':>7}{'oom':>5}{'jain':>6}  busy"
    )
    return "\n".join([head, *(_line(*row) for row in rows)]) + "\n"


def _line(policy: str, seed: int, result: Report) -> str:
    busy = " ".join(f"{share:.0%}" for share in result.busy_shares)
    return (
        f"{policy:<18}{seed:>5}{result.requests:>6}{result.in_time_share:>9.1%}{result.errors:>7}  "
        f"{_waits(result.small):<20}{_waits(result.large):<20}{result.tokens_per_second:>6.0f}"
        f"{result.loaded_gb:>7.0f}{result.spills:>7}{result.out_of_memory:>5}{result.jain:>6.2f}  {busy}"
    )


def _waits(waits: Waits) -> str:
    return f"{waits.p50:.1f}/{waits.p95:.1f}/{waits.p99:.1f}" if waits.count else "-"


def main() -> int:
    parser = argparse.ArgumentParser(prog="llamayard simulate")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
