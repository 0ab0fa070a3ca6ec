"""One trace twice: over an emulated stock server (or the router) with real HTTP and processes, and in the simulator.

The emulated one goes first; the simulator is then asked for the same numbers of words, since an emulated model ends
its answers by itself. Prints both side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from bench.scheduling.bench_sched import as_answered
from bench.scheduling.client import Answered, Player
from bench.scheduling.servers import PRODUCT, VERSIONS, Place, run_baseline
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.metrics import FIRST_TOKEN_SECONDS, TOKENS_PER_SECOND, is_in_time
from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Simulation


@dataclass(frozen=True, slots=True)
class Compared:
    """The same requests by both, in the same order."""

    emulated: list[Answered]
    simulated: list[Request]
    loads: tuple[list[str], list[str]]
    """Names of the models in the order in which they were loaded: emulated, simulated."""

    def in_time(self) -> tuple[float, float]:
        """Shares of the requests: emulated, simulated."""
        return (
            statistics.fmean(answered_in_time(one) for one in self.emulated),
            statistics.fmean(is_in_time(one) for one in self.simulated),
        )

    def median_ttft(self) -> tuple[float, float]:
        return (
            statistics.median(one.ttft_seconds for one in self.emulated),
            statistics.median(one.ttft_seconds or 0.0 for one in self.simulated),
        )


def answered_in_time(one: Answered) -> bool:
    if one.error or one.ttft_seconds > FIRST_TOKEN_SECONDS:
        return False
    first = one.first_token_at or 0.0
    return one.words < 2 or (one.words - 1) / max(1e-9, one.ended_at - first) >= TOKENS_PER_SECOND


def compare(policy: str, wanted: ScenarioSpec, speed: float) -> Compared:
    """Plays it on both."""
    scenario = replace(make_scenario(wanted), cold_start=True)
    embeds = frozenset(name for name, model in scenario.models.items() if model.is_embedding)
    with tempfile.TemporaryDirectory() as name:
        place = Place(wanted.rig, speed, Path(name))
        with run_baseline(policy, place) as url:
            answers = asyncio.run(Player(url, speed, embeds).play(scenario.sessions))
        loads = [str(load["model"]).removesuffix(":latest") for load in place.loads() if load["problem"] is None]
    played = replace(scenario, sessions=as_answered(scenario, answers))
    outcome = Simulation(played, make_baseline(policy, played)).run()
    residency_spans = [span.model.removesuffix(":latest") for span in outcome.stats.residency_spans]
    return Compared(answers, sorted(outcome.requests, key=lambda one: one.arrived_at), (loads, residency_spans))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=[*VERSIONS, PRODUCT], default="stock-0.24")
    parser.add_argument("--rig", default="4x3090")
    parser.add_argument("--mix", default="team")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=0.46)
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--each", action="store_true", help="every request")
    given = parser.parse_args()
    wanted = ScenarioSpec(given.rig, given.mix, given.seed, given.seconds, given.rate)
    found = compare(given.policy, wanted, given.speed)
    shares, medians = found.in_time(), found.median_ttft()
    out = sys.stdout
    out.write(f"{given.policy} on {given.rig}, {given.mix}, seed {given.seed}: {len(found.emulated)} requests\n")
    out.write(f"  in time      emulated {shares[0]:.1%}  simulated {shares[1]:.1%}\n")
    out.write(f"  loads        emulated {len(found.loads[0])}  simulated {len(found.loads[1])}\n")
    out.write(f"  median TTFT  emulated {medians[0]:.2f} s  simulated {medians[1]:.2f} s\n")
    if given.each:
        simulated = {(one.session, one.turn): one for one in found.simulated}
        for one in found.emulated:
            other = simulated[one.session, one.turn]
            ttft = other.ttft_seconds if other.ttft_seconds is not None else -1.0
            took, others = one.ended_at - one.arrived_at, (other.ended_at or 0.0) - other.arrived_at
            words = f"{one.arrived_at:7.1f} {one.model:<24}{one.prompt_tokens:>6}{one.words:>5}"
            words += f"  TTFT {one.ttft_seconds:7.2f} {ttft:7.2f}  whole {took:7.2f} {others:7.2f}  {one.error}"
            out.write(f"  {words}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
