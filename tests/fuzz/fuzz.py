"""Fuzzing by seed: `python -m tests.fuzz.fuzz --count 100000 --seed 1 --only heads,bodies`.

Every input is made from the target's name, the seed and its number, so that a finding is repeated by
`--only TARGET --seed S --first N --count 1`. Exit status 1 if there is a finding: an input that the router reads
otherwise than Go does, an exception, or one that takes longer than `HANG_SECONDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from structlog.testing import capture_logs

from tests.fuzz.go_http import SOURCE, GoHttp
from tests.fuzz.targets import Bodies, Configurations, Heads, KeyFiles, Keys, Target
from tests.fuzz.whole_product import admin, surface
from tests.llm_api.go_oracle import GoOracle, compile_oracle

HANG_SECONDS = 20
FINDINGS_MAX = 10
"""A target with that many findings is not fuzzed on."""


@dataclass(frozen=True, slots=True)
class Finding:
    target: str
    number: int
    data: bytes
    problem: str


class Hang(Exception):
    """One input took longer than `HANG_SECONDS`."""


def fuzz(target: Target, seed: int, numbers: range) -> list[Finding]:
    """Findings of the inputs with these numbers."""
    with _watched(), asyncio.Runner() as runner:
        return runner.run(_fuzz(target, seed, numbers))


async def _fuzz(target: Target, seed: int, numbers: range) -> list[Finding]:
    findings: list[Finding] = []
    for number in numbers:
        rng = random.Random(f"{target.name} {seed} {number}")
        data = target.make(rng)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            with capture_logs() as logs:
                await target.check(data, rng)
            assert not [log for log in logs if log["log_level"] == "error"], logs
        except (Exception, Hang) as error:
            findings.append(Finding(target.name, number, data, f"{type(error).__name__}: {error}"))
        if len(findings) >= FINDINGS_MAX:
            break
    problem = target.problem_of_log()
    return [*findings, *([Finding(target.name, -1, b"", problem)] if problem else [])]


@contextlib.contextmanager
def _watched() -> Generator[None]:
    def hangs(*_: object) -> None:
        raise Hang(f"longer than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def in_process(folder: Path) -> Generator[tuple[Target, ...]]:
    """Those that need no other process but the judges, which are compiled into `folder`."""
    http_binary = compile_oracle(folder / "http", SOURCE)
    with GoHttp(http_binary) as http, GoOracle(compile_oracle(folder / "json")) as go:
        yield Heads(http), Bodies(go), Keys(), KeyFiles(folder), Configurations(folder)


def report(target: Target, findings: Sequence[Finding], count: int, seconds: float) -> str:
    verdicts = ", ".join(f"{number} {text}" for text, number in target.verdicts.most_common())
    lines = [f"{target.name:10} {count} inputs in {seconds:.0f} s, {len(findings)} findings ({verdicts})"]
    return "\n".join((*lines, *(f"  {one.number}: {one.problem[:600]}\n    {one.data[:600]!r}" for one in findings)))


def main() -> int:
    """Returns 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="targets, with commas")
    given = parser.parse_args()
    found = 0
    for make in (in_process, surface, admin):
        with tempfile.TemporaryDirectory() as temporary, make(Path(temporary)) as targets:
            for target in targets:
                if given.only and target.name not in given.only.split(","):
                    continue
                began = time.monotonic()
                numbers = range(given.first, given.first + given.count)
                findings = fuzz(target, given.seed, numbers)
                print(report(target, findings, given.count, time.monotonic() - began), flush=True)
                found += len(findings)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
