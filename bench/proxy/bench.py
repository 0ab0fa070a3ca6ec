"""Benchmarks the proxy against other proxies, interleaved in one run: `make bench-relay`.

Every proxy runs in front of the same compiled server (upstream.c) under the same compiled load generator (load.c). They
take turns, phase by phase and round by round, so that noise affects all of them. A proxy has one CPU core; server and
load generator share another. The table shows medians over the rounds and the ratio to nginx within the same round, with
minimum and maximum. llamayard runs with its default settings: it schedules, counts and logs every request.
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

from bench.proxy.baselines import BASELINES, Baseline, Workspace, build, start_upstream, unavailable_reason

_ANSWER_TOKENS = "200"
"""Tokens per stream; each stream also pays for its start and end. The mean answer in the Azure LLM inference trace of
2023 has 211 tokens."""

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
_PHASES_SKIPPED_IF_SLOW = frozenset(
    ("streams200", "streams1000", "streams4000", "streams5000", "bursts", "bodies", "small256", "first")
)


@dataclass(slots=True)
class Sample:
    """One phase of one proxy in one round."""

    load: Mapping[str, Any]
    cpu_seconds: float
    rss_before_bytes: int
    rss_peak_bytes: int


@dataclass(slots=True)
class Metric:
    """A reported metric: title, phase, how to compute it, and its acceptance threshold if any."""

    title: str
    phase: str
    read: Callable[[Sample, Sample | None], float]
    """(sample of the proxy, direct sample of the same round) -> value."""
    number_format: str = "{:.0f}"
    threshold: float | None = None
    higher_is_better: bool = True
    is_absolute: bool = False
    """The threshold applies to the value itself, not to its ratio to nginx."""


def _per_million(sample: Sample, direct: Sample | None) -> float:
    del direct
    return 1e6 * sample.cpu_seconds / max(1, sample.load["tokens"])


def _added(which: str, quantile: str) -> Callable[[Sample, Sample | None], float]:
    def read(sample: Sample, direct: Sample | None) -> float:
        return sample.load[which][quantile] - (direct.load[which][quantile] if direct is not None else 0.0)

    return read


METRICS = (
    Metric("small requests/s, 64 connections", "small64", lambda s, _: s.load["per_second"], threshold=0.65),
    Metric("small requests/s, 256 connections", "small256", lambda s, _: s.load["per_second"], threshold=0.65),
    Metric(
        "CPU us per small request, 64 connections", "small64",
        lambda s, _: 1e6 * s.cpu_seconds / max(1, s.load["done"]), "{:.1f}"
    ),
    Metric("added p50 at 50 requests/s, us", "paced", _added("latency_us", "p50"),
           threshold=1.8, higher_is_better=False),
    Metric("added p99 at 50 requests/s, us", "paced", _added("latency_us", "p99")),
    Metric("added time to first token p50, us", "first", _added("first_us", "p50"),
           threshold=2.0, higher_is_better=False),
    Metric("CPU s per million tokens, 200 streams", "streams200", _per_million, "{:.1f}",
           threshold=1.25, higher_is_better=False),
    Metric("CPU s per million tokens, 1,000 streams", "streams1000", _per_million, "{:.1f}",
           threshold=1.15, higher_is_better=False),
    Metric("CPU s per million tokens, 4,000 streams", "streams4000", _per_million, "{:.1f}",
           threshold=1.25, higher_is_better=False),
    Metric("tokens/s served, 1,000 x 50", "streams1000", lambda s, _: s.load["tokens_per_second"]),
    Metric("tokens/s served, 4,000 x 10", "streams4000", lambda s, _: s.load["tokens_per_second"]),
    Metric("failed streams, 1,000 x 50", "streams1000", lambda s, _: float(s.load["failed"]), threshold=0.0,
           higher_is_better=False, is_absolute=True),
    Metric("failed streams, 4,000 x 10", "streams4000", lambda s, _: float(s.load["failed"]), threshold=0.0,
           higher_is_better=False, is_absolute=True),
    Metric("CPU s per million tokens, 5,000 streams", "streams5000", _per_million, "{:.1f}"),
    Metric("tokens/s served, 5,000 x 10", "streams5000", lambda s, _: s.load["tokens_per_second"]),
    Metric("failed streams, 5,000 x 10", "streams5000", lambda s, _: float(s.load["failed"]), threshold=0.0,
           higher_is_better=False, is_absolute=True),
    Metric("token delay p99 at 5,000 streams, us", "streams5000", lambda s, _: s.load["lag_us"]["p99"]),
    Metric("token delay p99 at 200 streams, us", "streams200", lambda s, _: s.load["lag_us"]["p99"], threshold=5000.0,
           higher_is_better=False, is_absolute=True),
    Metric("8 MB bodies, MB/s", "bodies", lambda s, _: s.load["body_mb_per_second"], threshold=0.5),
    Metric("batched bursts, tokens/s", "bursts", lambda s, _: s.load["tokens_per_second"], threshold=1.2),
    Metric("RSS KB per stream at 1,000 streams", "streams1000",
           lambda s, _: max(0.0, (s.rss_peak_bytes - s.rss_before_bytes) / 1000 / 1000), "{:.1f}", threshold=20.0,
           higher_is_better=False, is_absolute=True),
    Metric("RSS MB at 1,000 streams", "streams1000", lambda s, _: s.rss_peak_bytes / 1e6, "{:.1f}", threshold=80.0,
           higher_is_better=False, is_absolute=True),
)  # fmt: skip


@dataclass(slots=True)
class Run:
    """All samples: round -> phase -> proxy."""

    rounds: list[dict[str, dict[str, Sample]]] = field(default_factory=list[dict[str, dict[str, Sample]]])

    def values(self, metric: Metric, name: str) -> list[float]:
        values_per_round: list[float] = []
        for phases in self.rounds:
            samples = phases.get(metric.phase, {})
            if name in samples and not (name == "direct" and "added" in metric.title):
                values_per_round.append(metric.read(samples[name], samples.get("direct")))
        return values_per_round

    def ratios(self, metric: Metric, name: str) -> list[float]:
        values, nginx_values = self.values(metric, name), self.values(metric, "nginx")
        return [a / b for a, b in zip(values, nginx_values, strict=False) if b]


def _measure(baseline: Baseline, workspace: Workspace, phase: str, seconds: float) -> Sample:
    numbers = {"seconds": f"{seconds:g}", "burst": str(int(60_000 * seconds))}
    arguments = [part.format(**numbers) for part in _PHASES[phase]]
    if phase in ("small64", "paced"):
        arguments.append(baseline.target)
    cpu, before = baseline.cpu_seconds(), baseline.rss_bytes()
    process = subprocess.Popen(
        [str(workspace.load), str(baseline.port), *arguments], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.other_cores),  # noqa: PLW1509
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


def _run_rounds(proxies: list[Baseline], workspace: Workspace, rounds: int, seconds: float, phases: list[str]) -> Run:
    run = Run()
    for number in range(rounds):
        if number:
            _restart(proxies)
        run.rounds.append({})
        for phase in phases:
            samples = run.rounds[-1].setdefault(phase, {})
            order = proxies[number % len(proxies) :] + proxies[: number % len(proxies)]
            for baseline in order:
                if baseline.is_slow and phase in _PHASES_SKIPPED_IF_SLOW:
                    continue
                samples[baseline.name] = _measure(baseline, workspace, phase, seconds)
                print(".", end="", flush=True)
        print(f" round {number + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}", flush=True)
    return run


def _restart(proxies: list[Baseline]) -> None:
    """Restarts the proxies, so that no round is affected by memory left over from the previous one."""
    for baseline in proxies:
        if baseline.process is not None and not baseline.is_slow:
            baseline.stop()
            baseline.start()
    time.sleep(1.0)


def _read(files: list[Path]) -> Run:
    """Reads rounds written by earlier runs with `--json`."""
    run = Run()
    for file in files:
        for phases in json.loads(file.read_text("utf-8")):
            run.rounds.append(
                {phase: {name: Sample(**sample) for name, sample in by.items()} for phase, by in phases.items()}
            )
    return run


def report(run: Run, names: list[str], phases: list[str]) -> str:
    """Markdown table: per metric, each proxy's median and its ratio to nginx with minimum and maximum."""
    lines = [f"| metric | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for metric in (f for f in METRICS if f.phase in phases):
        cells = [_cell(run, metric, name) for name in names]
        lines.append(f"| {metric.title} | {' | '.join(cells)} |")
    lines.append("")
    lines += [_verdict(run, metric) for metric in METRICS if metric.phase in phases and metric.threshold is not None]
    return "\n".join(lines)


def _cell(run: Run, metric: Metric, name: str) -> str:
    values = run.values(metric, name)
    if not values:
        return "-"
    text = metric.number_format.format(statistics.median(values))
    ratios = run.ratios(metric, name)
    if ratios and name not in ("nginx", "direct"):
        text += f" ({statistics.median(ratios):.2f}; {min(ratios):.2f}-{max(ratios):.2f})"
    return text


def _verdict(run: Run, metric: Metric) -> str:
    assert metric.threshold is not None
    values = run.values(metric, "llamayard") if metric.is_absolute else run.ratios(metric, "llamayard")
    if not values:
        return f"{metric.title}: not measured"
    value = statistics.median(values)
    holds = value >= metric.threshold if metric.higher_is_better else value <= metric.threshold
    sign = ">=" if metric.higher_is_better else "<="
    return f"{'PASS' if holds else 'FAIL'}: {metric.title}: {value:.2f} ({sign} {metric.threshold:g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each phase")
    parser.add_argument("--only", default=",".join(BASELINES), help="proxies, comma-separated")
    parser.add_argument("--phases", default=",".join(_PHASES), help="phases, comma-separated")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--read", type=Path, nargs="+", help="print results of --json files, measure nothing")
    args = parser.parse_args()
    phases = [name for name in args.phases.split(",") if name in _PHASES]
    if args.read:
        print(report(_read(args.read), [name for name in args.only.split(",") if name in BASELINES], phases))
        return 0
    workspace = build(Path(".cache/bench-relay"))
    names = [name for name in args.only.split(",") if name in BASELINES]
    missing = [f"{name} ({reason})" for name in names if (reason := unavailable_reason(name, workspace)) is not None]
    names = [name for name in names if unavailable_reason(name, workspace) is None]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release()}"
    )
    if missing:
        print("skipped:", "; ".join(missing))
    upstream = start_upstream(workspace)
    proxies: list[Baseline] = []
    try:
        for name in names:
            proxies.append(BASELINES[name](workspace))
            proxies[-1].start()
        time.sleep(1.0)
        run = _run_rounds(proxies, workspace, args.rounds, args.seconds, phases)
    finally:
        for baseline in proxies:
            baseline.stop()
        upstream.kill()
    if args.json is not None:
        dumped = [
            {phase: {name: asdict(sample) for name, sample in by.items()} for phase, by in phases_.items()}
            for phases_ in run.rounds
        ]
        args.json.write_text(json.dumps(dumped), "utf-8")
    print(report(run, names, phases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
