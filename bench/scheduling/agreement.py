"""Compares the simulator with emulated servers: runs one trace on both and prints the results side by side.

The emulated run (real HTTP and processes, a stock server or the router) goes first. The simulator then gets the same
answer lengths, because an emulated model decides itself when an answer ends.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from bench.scheduling.bench_sched import with_measured_answers
from bench.scheduling.client import MeasuredRequest, Player
from bench.scheduling.servers import ROUTER, STOCK_VERSIONS, RunSetup, run_baseline
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.metrics import FIRST_TOKEN_SECONDS, TOKENS_PER_SECOND, is_in_ten_seconds
from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Simulation


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of both runs, requests in the same order."""

    emulated: list[MeasuredRequest]
    simulated: list[Request]
    loads: tuple[list[str], list[str]]
    """Names of the models in load order: emulated, simulated."""

    def in_ten_seconds(self) -> tuple[float, float]:
        """Shares of requests answered within 10 s: emulated, simulated."""
        return (
            statistics.fmean(is_answer_in_ten_seconds(one) for one in self.emulated),
            statistics.fmean(is_in_ten_seconds(one) for one in self.simulated),
        )

    def median_ttft(self) -> tuple[float, float]:
        return (
            statistics.median(one.ttft_seconds for one in self.emulated),
            statistics.median(one.ttft_seconds or 0.0 for one in self.simulated),
        )


def is_answer_in_ten_seconds(one: MeasuredRequest) -> bool:
    if one.error or one.ttft_seconds > FIRST_TOKEN_SECONDS:
        return False
    first = one.first_token_at or 0.0
    return one.generated_tokens < 2 or (one.generated_tokens - 1) / max(1e-9, one.ended_at - first) >= TOKENS_PER_SECOND


def compare(policy: str, spec: ScenarioSpec, speed: float) -> Comparison:
    """Runs the scenario on the emulated servers and in the simulator."""
    scenario = replace(make_scenario(spec), cold_start=True)
    embeds = frozenset(name for name, model in scenario.models.items() if model.is_embedding)
    with tempfile.TemporaryDirectory() as name:
        setup = RunSetup(spec.rig, speed, Path(name))
        with run_baseline(policy, setup) as url:
            answers = asyncio.run(Player(url, speed, embeds).play(scenario.sessions))
        loads = [str(load["model"]).removesuffix(":latest") for load in setup.loads() if load["problem"] is None]
    replayed = replace(scenario, sessions=with_measured_answers(scenario, answers))
    outcome = Simulation(replayed, make_baseline(policy, replayed)).run()
    residency_spans = [span.model.removesuffix(":latest") for span in outcome.stats.residency_spans]
    return Comparison(answers, sorted(outcome.requests, key=lambda one: one.arrived_at), (loads, residency_spans))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=[*STOCK_VERSIONS, ROUTER], default="stock-0.24")
    parser.add_argument("--rig", default="4x3090")
    parser.add_argument("--mix", default="team")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=0.46)
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--each", action="store_true", help="print every request")
    args = parser.parse_args()
    spec = ScenarioSpec(args.rig, args.mix, args.seed, args.seconds, args.rate)
    comparison = compare(args.policy, spec, args.speed)
    shares, medians = comparison.in_ten_seconds(), comparison.median_ttft()
    out = sys.stdout
    out.write(f"{args.policy} on {args.rig}, {args.mix}, seed {args.seed}: {len(comparison.emulated)} requests\n")
    out.write(f"  within 10 s  emulated {shares[0]:.1%}  simulated {shares[1]:.1%}\n")
    out.write(f"  loads        emulated {len(comparison.loads[0])}  simulated {len(comparison.loads[1])}\n")
    out.write(f"  median TTFT  emulated {medians[0]:.2f} s  simulated {medians[1]:.2f} s\n")
    if args.each:
        simulated = {(one.session, one.turn): one for one in comparison.simulated}
        for one in comparison.emulated:
            other = simulated[one.session, one.turn]
            ttft = other.ttft_seconds if other.ttft_seconds is not None else -1.0
            emulated_seconds, simulated_seconds = (
                one.ended_at - one.arrived_at,
                (other.ended_at or 0.0) - other.arrived_at,
            )
            line = f"{one.arrived_at:7.1f} {one.model:<24}{one.prompt_tokens:>6}{one.generated_tokens:>5}"
            line += f"  TTFT {one.ttft_seconds:7.2f} {ttft:7.2f}"
            line += f"  total {emulated_seconds:7.2f} {simulated_seconds:7.2f}  {one.error}"
            out.write(f"  {line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
