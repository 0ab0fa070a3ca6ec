"""The contestants as real processes over EMULATED servers, the same sessions for each, and the bars that must hold.

`make bench-sched` runs it. Contestants take turns, one at a time on an otherwise idle machine: all of them play a cell
with one seed before the next begins, each time another one first. The floor is simulated, with the very answers that
the router's run had. Emulated seconds pass `--speed` times as fast as real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.scheduling.bench_sim import FLOOR, OURS, Cell, Task, bars, mean, share, show
from bench.scheduling.client import Answered, Player
from bench.scheduling.servers import NGINX, VERSIONS, Place, nginx, run_baseline
from router.domain.model import ModelFacts
from router.lab.scenarios import ScenarioSpec, default_rate, large_models, make_baseline, make_scenario
from router.lab.simulator.metrics import Report, is_in_time, jain, report, ttft_percentiles
from router.lab.simulator.requests import SERVED, Request
from router.lab.simulator.runner import Scenario, Simulation
from router.lab.simulator.workload import Session

CELLS = ("4x3090/team", "4x3090/wide", "4090+3090/team")
ALL = (*VERSIONS, *NGINX, OURS)
_SECONDS = 480.0
_TWINS = 20
"""How often each run is simulated with its own answers."""
_MEANT = "EMULATED servers, real processes"


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant, one cell, one seed."""

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
class Outcome:
    """What came of it."""

    report: Report
    answers: list[Answered]
    took_seconds: float


def play(run: Run) -> Outcome:
    """Starts the contestant, plays the sessions, ends it."""
    scenario = run.scenario
    embeds = frozenset(name for name, model in scenario.models.items() if model.is_embedding)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-sched-") as name:
        place = Place(run.rig, run.speed, Path(name), tuple(scenario.models.values()))
        with run_baseline(run.policy, place) as url:
            answers = asyncio.run(Player(url, run.speed, embeds).play(scenario.sessions))
        made = report_of(scenario, answers, place.loads())
    return Outcome(made, answers, time.monotonic() - began)


def report_of(scenario: Scenario, answers: Sequence[Answered], loads: Sequence[dict[str, object]]) -> Report:
    """The figures that the simulator gives of its runs, of what the clients saw and the emulated rig recorded."""
    requests = [_as_request(number, one, scenario.models[one.model]) for number, one in enumerate(answers)]
    large = large_models(scenario)
    done = [load for load in loads if load["problem"] is None]
    ended_at = max((one.ended_at for one in answers), default=0.0)
    return Report(
        requests=len(requests),
        in_time=sum(is_in_time(one) for one in requests),
        errors=sum(one.outcome != SERVED for one in requests),
        hung_up=0,
        small=ttft_percentiles([one for one in requests if one.model.name not in large], ended_at),
        large=ttft_percentiles([one for one in requests if one.model.name in large], ended_at),
        tokens_per_second=sum(one.words for one in answers if not one.error) / max(1e-9, ended_at),
        loads=len(done),
        loaded_gb=sum(float(str(load["weights_bytes"])) for load in done) / 1e9,
        spills=sum(not load["is_whole"] for load in done),
        out_of_memory=sum("out of memory" in str(load["problem"]) for load in loads),
        jain=jain(requests),
        busy_shares=(),
        seconds=ended_at,
    )


def _as_request(number: int, one: Answered, model: ModelFacts) -> Request:
    return Request(
        id=number,
        user=one.user,
        session=one.session,
        turn=one.turn,
        model=model,
        prompt_tokens=one.prompt_tokens,
        shared_tokens=one.shared_tokens,
        generated_tokens=one.words,
        arrived_at=one.arrived_at,
        first_token_at=one.first_token_at,
        ended_at=one.ended_at,
        outcome=one.error or SERVED,
    )


def as_answered(scenario: Scenario, answers: Sequence[Answered]) -> tuple[Session, ...]:
    """The sessions with as many words and as much shared prompt as they really had."""
    by_turn = {(one.session, one.turn): one for one in answers}
    sessions: list[Session] = []
    for session in scenario.sessions:
        had = [(turn, by_turn[session.id, number]) for number, turn in enumerate(session.turns)]
        turns = tuple(
            replace(turn, generated_tokens=one.words, shared_tokens=one.shared_tokens) for turn, one in had
        )  # fmt: skip
        sessions.append(replace(session, turns=turns))
    return tuple(sessions)


def in_simulator(policy: str, run: Run, answers: Sequence[Answered], times: int = 1) -> dict[int, Report]:
    """The same requests with the same answers, simulated: once as they came, then with arrivals up to a second later.

    Where models thrash, one load the other way changes all that follows, and real processes are never as punctual as
    simulated ones: what both do on average can be compared, what they do once cannot.
    """
    scenario = run.scenario
    sessions, large = as_answered(scenario, answers), large_models(scenario)
    found: dict[int, Report] = {}
    for number in range(times):
        played = replace(scenario, sessions=later(sessions, number) if number else sessions)
        found[number] = report(Simulation(played, make_baseline(policy, played)).run(), large)
    return found


def later(sessions: Iterable[Session], number: int) -> tuple[Session, ...]:
    """With each turn up to a second later, as chance has it; the same number is the same chance."""
    rng = random.Random(number)
    return tuple(
        replace(one, turns=tuple(replace(turn, at_seconds=turn.at_seconds + rng.random()) for turn in one.turns))
        for one in sessions
    )


def runs(given: argparse.Namespace) -> Iterable[Run]:
    """Interleaved; each time another contestant is the first. nginx, which takes longest, plays fewer seeds."""
    for turn, seed in enumerate(given.seeds):
        for cell in given.cells:
            rig, _, mix = cell.partition("/")
            for index in range(len(given.policies)):
                policy = given.policies[(index + turn) % len(given.policies)]
                if policy not in NGINX or turn < given.nginx_seeds:
                    yield Run(policy, rig, mix, seed, given.speed, given.seconds)


def line(run: Run, outcome: Outcome, twins: dict[int, Report]) -> str:
    """`twins`: the same in the simulator."""
    made, shares = outcome.report, [one.in_time_share for one in twins.values()]
    words = f"{run.cell:<16}seed {run.seed}  {run.policy:<18}in time {made.in_time_share:6.1%} of {made.requests}"
    words += f" (simulated {share(twins):.1%}, {min(shares):.0%}-{max(shares):.0%}, {mean(twins, 'loaded_gb'):.0f} GB)"
    words += f"  {made.loads} loads, {made.loaded_gb:.0f} GB, {made.spills} spilled, {made.out_of_memory} OOM, "
    words += f"{made.errors} errors  ({made.seconds:.0f} emulated s, {outcome.took_seconds:.0f} s)"
    errors = sorted({one.error for one in outcome.answers if one.error})
    return "\n".join([words, *(f"    error: {error[:160]}" for error in errors[:3])]) + "\n"


def finish(cell: str, found: Cell) -> int:
    """Prints a cell and its bars; how many do not hold."""
    rig, _, mix = cell.partition("/")
    sys.stdout.write("\n".join(show(f"{cell}, {default_rate(rig, mix):.2f} requests/s", found, _MEANT)) + "\n")
    broken = 0
    if OURS in found and any(policy in found for policy in VERSIONS):
        for words, holds in bars(Task(rig, mix, 1.0, OURS, 1), found):
            sys.stdout.write(f"    {'holds ' if holds else 'BROKEN'}  {words}\n")
            broken += not holds
    sys.stdout.flush()
    return broken


def main() -> int:
    """1 where a bar does not hold."""
    given = _arguments()
    if nginx() is None and set(NGINX) & set(given.policies):
        sys.stdout.write("no nginx (make nginx): it does not take part\n")
        given.policies = [policy for policy in given.policies if policy not in NGINX]
    cells: dict[str, Cell] = {}
    rows: list[dict[str, object]] = []
    for run in runs(given):
        outcome = play(run)
        twins = in_simulator(run.policy, run, outcome.answers, _TWINS)
        sys.stdout.write(line(run, outcome, twins))
        sys.stdout.flush()
        cells.setdefault(run.cell, {}).setdefault(run.policy, {})[run.seed] = outcome.report
        if run.policy == OURS:
            (floor,) = in_simulator(FLOOR, run, outcome.answers).values()
            cells[run.cell].setdefault(FLOOR, {})[run.seed] = floor
        rows.append({"cell": run.cell, "policy": run.policy, "seed": run.seed, **outcome.report.as_dict(),
                     "simulated": [twin.as_dict() for twin in twins.values()]})  # fmt: skip
        if given.out is not None:
            given.out.write_text(json.dumps({"emulated": True, "speed": run.speed, "runs": rows}, indent=1) + "\n")
    broken = sum(finish(cell, found) for cell, found in cells.items())
    sys.stdout.write(f"\n{broken} bars do not hold\n")
    return 1 if broken else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), metavar="RIG/MIX")
    parser.add_argument("--policies", nargs="*", default=list(ALL), choices=ALL)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--nginx-seeds", type=int, default=1, help="how many of the seeds nginx plays")
    parser.add_argument("--speed", type=float, default=8.0, help="emulated seconds in a real one")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="how long requests arrive, emulated")
    parser.add_argument("--out", type=Path, help="where the figures of every run go, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
