"""Benchmarks the relay beside other proxies, in one run and interleaved: `make bench-relay`.

Every contestant stands before the same compiled server (upstream.c) and is asked by the same compiled client (load.c),
in turn, phase by phase and round by round, so that a noisy machine is noisy for all. A contestant has one core to
itself and server and client share another. What is printed are medians over the rounds and ratios to nginx within the
same round, with the smallest and the largest. llamayard runs as it ships: it decides every request, counts it and
writes its access log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.proxy.baselines import BASELINES, Baseline, Place, available, build, start_upstream

_ANSWER_TOKENS = "200"
"""Of a stream: each pays for its beginning and its end too. The mean answer of the conversations in the Azure LLM
inference trace of 2023 has 211."""

_PHASES: Mapping[str, tuple[str, ...]] = {
    "small64": ("small", "64", "{seconds}"),
    "small256": ("small", "256", "{seconds}"),
    "paced": ("paced", "50", "{seconds}"),
    "first": ("first", "50", "{seconds}"),
    "streams200": ("streams", "200", _ANSWER_TOKENS, "50", "1"),
    "streams1000": ("streams", "1000", _ANSWER_TOKENS, "50", "1"),
    "streams4000": ("streams", "4000", _ANSWER_TOKENS, "10", "1"),
    "streams5000": ("streams", "5000", _ANSWER_TOKENS, "10", "1"),
    "bodies": ("bodies", "4", "{seconds}", "8000000"),
    "bursts": ("streams", "10", "{burst}", "0", "100"),
}
_SLOW_CONTESTANTS_SKIP = frozenset(
    ("streams200", "streams1000", "streams4000", "streams5000", "bursts", "bodies", "small256", "first")
)


@dataclass(slots=True)
class Sample:
    """One phase of one contestant in one round."""

    load: Mapping[str, Any]
    cpu_seconds: float
    rss_before_bytes: int
    rss_peak_bytes: int


@dataclass(slots=True)
class Figure:
    """What is made of a phase's samples: a name, how to read it, and the bar if there is one."""

    title: str
    phase: str
    read: Callable[[Sample, Sample | None], float]
    """From the contestant's sample and the direct one of the same round."""
    form: str = "{:.0f}"
    bar: float | None = None
    at_least: bool = True
    absolute: bool = False
    """The bar is on the figure itself, not on its ratio to nginx."""


def _per_million(sample: Sample, direct: Sample | None) -> float:
    del direct
    return 1e6 * sample.cpu_seconds / max(1, sample.load["tokens"])


def _added(which: str, quantile: str) -> Callable[[Sample, Sample | None], float]:
    def read(sample: Sample, direct: Sample | None) -> float:
        return sample.load[which][quantile] - (direct.load[which][quantile] if direct is not None else 0.0)

    return read


FIGURES = (
    Figure("small requests/s, 64 connections", "small64", lambda s, _: s.load["per_second"], bar=0.65),
    Figure("small requests/s, 256 connections", "small256", lambda s, _: s.load["per_second"], bar=0.65),
    Figure(
        "CPU us a small request, 64", "small64", lambda s, _: 1e6 * s.cpu_seconds / max(1, s.load["done"]), "{:.1f}"
    ),
    Figure("added p50 at 50 requests/s, us", "paced", _added("latency_us", "p50"), bar=1.8, at_least=False),
    Figure("added p99 at 50 requests/s, us", "paced", _added("latency_us", "p99")),
    Figure("added time to first token p50, us", "first", _added("first_us", "p50"), bar=2.0, at_least=False),
    Figure("CPU s a million tokens, 200 streams", "streams200", _per_million, "{:.1f}", bar=1.25, at_least=False),
    Figure("CPU s a million tokens, 1,000 streams", "streams1000", _per_million, "{:.1f}", bar=1.15, at_least=False),
    Figure("CPU s a million tokens, 4,000 streams", "streams4000", _per_million, "{:.1f}", bar=1.25, at_least=False),
    Figure("tokens/s served, 1,000 x 50", "streams1000", lambda s, _: s.load["tokens_per_second"]),
    Figure("tokens/s served, 4,000 x 10", "streams4000", lambda s, _: s.load["tokens_per_second"]),
    Figure("streams not served, 1,000 x 50", "streams1000", lambda s, _: float(s.load["failed"]), bar=0.0,
           at_least=False, absolute=True),
    Figure("streams not served, 4,000 x 10", "streams4000", lambda s, _: float(s.load["failed"]), bar=0.0,
           at_least=False, absolute=True),
    Figure("CPU s a million tokens, 5,000 streams", "streams5000", _per_million, "{:.1f}"),
    Figure("tokens/s served, 5,000 x 10", "streams5000", lambda s, _: s.load["tokens_per_second"]),
    Figure("streams not served, 5,000 x 10", "streams5000", lambda s, _: float(s.load["failed"]), bar=0.0,
           at_least=False, absolute=True),
    Figure("relay lag p99 at 5,000 streams, us", "streams5000", lambda s, _: s.load["lag_us"]["p99"]),
    Figure("relay lag p99 at 200 streams, us", "streams200", lambda s, _: s.load["lag_us"]["p99"], bar=5000.0,
           at_least=False, absolute=True),
    Figure("8 MB bodies, MB/s", "bodies", lambda s, _: s.load["body_mb_per_second"], bar=0.5),
    Figure("batched bursts, tokens/s", "bursts", lambda s, _: s.load["tokens_per_second"], bar=1.2),
    Figure("RSS KB a stream at 1,000", "streams1000",
           lambda s, _: max(0.0, (s.rss_peak_bytes - s.rss_before_bytes) / 1000 / 1000), "{:.1f}", bar=20.0,
           at_least=False, absolute=True),
    Figure("RSS MB at 1,000 streams", "streams1000", lambda s, _: s.rss_peak_bytes / 1e6, "{:.1f}", bar=80.0,
           at_least=False, absolute=True),
)  # fmt: skip


@dataclass(slots=True)
class Run:
    """All samples: round -> phase -> contestant."""

    rounds: list[dict[str, dict[str, Sample]]] = field(default_factory=list[dict[str, dict[str, Sample]]])

    def values(self, figure: Figure, name: str) -> list[float]:
        found: list[float] = []
        for phases in self.rounds:
            samples = phases.get(figure.phase, {})
            if name in samples and not (name == "direct" and "added" in figure.title):
                found.append(figure.read(samples[name], samples.get("direct")))
        return found

    def ratios(self, figure: Figure, name: str) -> list[float]:
        ours, theirs = self.values(figure, name), self.values(figure, "nginx")
        return [a / b for a, b in zip(ours, theirs, strict=False) if b]


def _measure(baseline: Baseline, place: Place, phase: str, seconds: float) -> Sample:
    numbers = {"seconds": f"{seconds:g}", "burst": str(int(60_000 * seconds))}
    arguments = [part.format(**numbers) for part in _PHASES[phase]]
    if phase in ("small64", "paced"):
        arguments.append(baseline.target)
    cpu, before = baseline.cpu_seconds(), baseline.rss_bytes()
    process = subprocess.Popen(
        [str(place.load), str(baseline.port), *arguments], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, place.other_cores),  # noqa: PLW1509
    )  # fmt: skip
    peak = before
    while process.poll() is None:
        peak = max(peak, baseline.rss_bytes())
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    assert process.stdout is not None
    text = process.stdout.read()
    if not text.strip():
        raise RuntimeError(f"{baseline.name}, {phase}: the load generator ended with {process.returncode}")
    return Sample(json.loads(text), baseline.cpu_seconds() - cpu, before, peak)


def _play(contestants: list[Baseline], place: Place, rounds: int, seconds: float, phases: list[str]) -> Run:
    run = Run()
    for number in range(rounds):
        if number:
            _renew(contestants)
        run.rounds.append({})
        for phase in phases:
            samples = run.rounds[-1].setdefault(phase, {})
            order = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
            for baseline in order:
                if baseline.is_slow and phase in _SLOW_CONTESTANTS_SKIP:
                    continue
                samples[baseline.name] = _measure(baseline, place, phase, seconds)
                print(".", end="", flush=True)
        print(f" round {number + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}", flush=True)
    return run


def _renew(contestants: list[Baseline]) -> None:
    """A round shows nothing of what the one before has left: memory most of all."""
    for baseline in contestants:
        if baseline.process is not None and not baseline.is_slow:
            baseline.stop()
            baseline.start()
    time.sleep(1.0)


def _read(files: list[Path]) -> Run:
    """Rounds that earlier runs wrote with `--json`."""
    run = Run()
    for file in files:
        for phases in json.loads(file.read_text("utf-8")):
            run.rounds.append(
                {phase: {name: Sample(**sample) for name, sample in by.items()} for phase, by in phases.items()}
            )
    return run


def report(run: Run, names: list[str], phases: list[str]) -> str:
    """The table in Markdown: per figure, each contestant's median and its ratio to nginx with its spread."""
    lines = [f"| figure | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for figure in (f for f in FIGURES if f.phase in phases):
        cells = [_cell(run, figure, name) for name in names]
        lines.append(f"| {figure.title} | {' | '.join(cells)} |")
    lines.append("")
    lines += [_verdict(run, figure) for figure in FIGURES if figure.phase in phases and figure.bar is not None]
    return "\n".join(lines)


def _cell(run: Run, figure: Figure, name: str) -> str:
    values = run.values(figure, name)
    if not values:
        return "-"
    text = figure.form.format(statistics.median(values))
    ratios = run.ratios(figure, name)
    if ratios and name not in ("nginx", "direct"):
        text += f" ({statistics.median(ratios):.2f}; {min(ratios):.2f}-{max(ratios):.2f})"
    return text


def _verdict(run: Run, figure: Figure) -> str:
    assert figure.bar is not None
    values = run.values(figure, "llamayard") if figure.absolute else run.ratios(figure, "llamayard")
    if not values:
        return f"{figure.title}: not measured"
    value = statistics.median(values)
    holds = value >= figure.bar if figure.at_least else value <= figure.bar
    sign = ">=" if figure.at_least else "<="
    return f"{'holds' if holds else 'FAILS'}: {figure.title}: {value:.2f} (bar {sign} {figure.bar:g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each phase")
    parser.add_argument("--only", default=",".join(BASELINES), help="contestants, by comma")
    parser.add_argument("--phases", default=",".join(_PHASES), help="phases, by comma")
    parser.add_argument("--json", type=Path, help="write all samples there")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing: print what such files hold, as one run")
    given = parser.parse_args()
    phases = [name for name in given.phases.split(",") if name in _PHASES]
    if given.read:
        print(report(_read(given.read), [name for name in given.only.split(",") if name in BASELINES], phases))
        return 0
    place = build(Path(".cache/bench-relay"))
    names = [name for name in given.only.split(",") if name in BASELINES]
    missing = [f"{name} ({why})" for name in names if (why := available(name, place)) is not None]
    names = [name for name in names if available(name, place) is None]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release()}"
    )
    if missing:
        print("left out:", "; ".join(missing))
    upstream = start_upstream(place)
    contestants: list[Baseline] = []
    try:
        for name in names:
            contestants.append(BASELINES[name](place))
            contestants[-1].start()
        time.sleep(1.0)
        run = _play(contestants, place, given.rounds, given.seconds, phases)
    finally:
        for baseline in contestants:
            baseline.stop()
        upstream.kill()
    if given.json is not None:
        dumped = [
            {phase: {name: asdict(sample) for name, sample in by.items()} for phase, by in phases_.items()}
            for phases_ in run.rounds
        ]
        given.json.write_text(json.dumps(dumped), "utf-8")
    print(report(run, names, phases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
