"""Benchmarks the proxy against other proxies, interleaved in one run: `make bench-relay`.

Every proxy runs in front of the same compiled server (upstream.c) under the same compiled load generator (load.c). They
take turns, phase by phase and round by round, so that noise affects all of them. A proxy has one CPU core; server and
load generator share another. The table shows medians over the rounds and the ratio to nginx within the same round, with
minimum and maximum. llamayard runs with its default settings: it schedules, counts and logs every request. Requests are
written as in `shapes.py`: each phase asks with the shapes that it lists, unless `--shapes` names others.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.proxy.baselines import BASELINES, Baseline, Workspace, build, start_upstream, unavailable_reason
from bench.proxy.shapes import SHAPES, Shape

_ANSWER_TOKENS = 200
"""Tokens per stream; each stream also pays for its start and end. The mean answer in the Azure LLM inference trace of
2023 has 211 tokens."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What the load generator does: its arguments after the file with the requests, and how those are written."""

    arguments: tuple[str, ...]
    shapes: tuple[str, ...] = ("bare", "langchain")
    query: str = ""
    """What the server is to answer with, as in upstream.c; with "" one short JSON."""
    body_bytes: int = 0
    """Added to each body."""

    def requests(self, shape: Shape) -> list[bytes]:
        """Sent in turn. Short ones differ in length, as with real clients."""
        if self.body_bytes or "image" in shape.client or "agent" in shape.client:
            return [shape.request(self.body_bytes, stream=bool(self.query), query=self.query)]
        return [shape.request(7 * number, stream=bool(self.query), query=self.query) for number in range(16)]


def _streams(count: int, rate: int) -> Phase:
    return Phase(
        ("streams", str(count), str(_ANSWER_TOKENS)), ("bare", "open-webui"), f"?t={_ANSWER_TOKENS}&r={rate}&b=1"
    )


_PHASES: Mapping[str, Phase] = {
    "small64": Phase(("closed", "64", "{small}"), ("bare", "open-webui", "langchain", "ollama-python", "openai-tools")),
    "small256": Phase(("closed", "256", "{small}")),
    "paced": Phase(("paced", "50", "{seconds}")),
    "first": Phase(("first", "50", "{seconds}"), query="?t=1&r=0"),
    "streams200": _streams(200, 50),
    "streams1000": _streams(1000, 50),
    "streams4000": _streams(4000, 10),
    "streams5000": _streams(5000, 10),
    "prompts": Phase(("closed", "16", "{prompts}"), ("agent",)),
    "images": Phase(("closed", "4", "{images}"), ("image",)),
    "bodies": Phase(("closed", "4", "{bodies}"), ("bare", "open-webui", "langchain"), body_bytes=8_000_000),
    "huge": Phase(("closed", "1", "3"), ("bare", "open-webui", "langchain"), body_bytes=200_000_000),
    "bursts": Phase(("streams", "10", "{burst}"), ("bare", "open-webui"), "?t={burst}&r=0&b=100"),
}
_PER_SECOND = {"small": 5_000, "prompts": 1_000, "images": 200, "bodies": 60, "burst": 60_000}
"""How much is asked for `--seconds`: as much of every proxy, because the CPU time that it takes is measured too."""
_SLOW_PHASES = frozenset(("small64", "paced"))
"""What a slow proxy is asked with, if it has the path."""


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


def _per_request(sample: Sample, direct: Sample | None) -> float:
    del direct
    return 1e6 * sample.cpu_seconds / max(1, sample.load["done"])


def _added(which: str, quantile: str) -> Callable[[Sample, Sample | None], float]:
    def read(sample: Sample, direct: Sample | None) -> float:
        return sample.load[which][quantile] - (direct.load[which][quantile] if direct is not None else 0.0)

    return read


METRICS = (
    Metric("small requests/s, 64 connections", "small64", lambda s, _: s.load["per_second"], threshold=0.2),
    Metric("small requests/s, 256 connections", "small256", lambda s, _: s.load["per_second"], threshold=0.2),
    Metric("CPU us per small request, 64 connections", "small64", _per_request, "{:.1f}", threshold=5.0,
           higher_is_better=False),
    Metric("added p50 at 50 requests/s, us", "paced", _added("latency_us", "p50"),
           threshold=1.4, higher_is_better=False),
    Metric("added p99 at 50 requests/s, us", "paced", _added("latency_us", "p99")),
    Metric("added time to first token p50, us", "first", _added("first_us", "p50"),
           threshold=2.0, higher_is_better=False),
    Metric("CPU s per million tokens, 200 streams", "streams200", _per_million, "{:.1f}",
           threshold=1.2, higher_is_better=False),
    Metric("CPU s per million tokens, 1,000 streams", "streams1000", _per_million, "{:.1f}",
           threshold=1.07, higher_is_better=False),
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
    Metric("prompts of 100 KB, requests/s", "prompts", lambda s, _: s.load["per_second"]),
    Metric("CPU us per prompt of 100 KB", "prompts", _per_request, "{:.1f}"),
    Metric("CPU us per image of 2 MB", "images", _per_request),
    Metric("CPU us per body of 8 MB", "bodies", _per_request, threshold=1.67, higher_is_better=False),
    Metric("CPU s per million tokens in bursts", "bursts", _per_million, "{:.2f}", threshold=0.67,
           higher_is_better=False),
    Metric("images of 2 MB, MB/s", "images", lambda s, _: s.load["sent_mb_per_second"]),
    Metric("8 MB bodies, MB/s", "bodies", lambda s, _: s.load["sent_mb_per_second"], threshold=0.6),
    Metric("RSS MB for bodies of 200 MB", "huge", lambda s, _: (s.rss_peak_bytes - s.rss_before_bytes) / 1e6,
           threshold=220.0, higher_is_better=False, is_absolute=True),
    Metric("200 MB bodies, MB/s", "huge", lambda s, _: s.load["sent_mb_per_second"]),
    Metric("batched bursts, tokens/s", "bursts", lambda s, _: s.load["tokens_per_second"], threshold=1.5),
    Metric("RSS KB per stream at 1,000 streams", "streams1000",
           lambda s, _: max(0.0, (s.rss_peak_bytes - s.rss_before_bytes) / 1000 / 1000), "{:.1f}", threshold=20.0,
           higher_is_better=False, is_absolute=True),
    Metric("RSS MB at 1,000 streams", "streams1000", lambda s, _: s.rss_peak_bytes / 1e6, "{:.1f}", threshold=80.0,
           higher_is_better=False, is_absolute=True),
)  # fmt: skip


@dataclass(slots=True)
class Run:
    """All samples: round -> phase and shape, as in "small64/bare" -> proxy."""

    rounds: list[dict[str, dict[str, Sample]]] = field(default_factory=list[dict[str, dict[str, Sample]]])

    def shapes(self, metric: Metric) -> list[str]:
        """The shapes that the metric was measured with."""
        keys = dict.fromkeys(key for samples in self.rounds for key in samples)
        return [key.partition("/")[2] for key in keys if key.partition("/")[0] == metric.phase]

    def values(self, metric: Metric, shape: str, name: str) -> list[float]:
        values_per_round: list[float] = []
        for phases in self.rounds:
            samples = phases.get(f"{metric.phase}/{shape}", {})
            if name in samples and not (name == "direct" and "added" in metric.title):
                values_per_round.append(metric.read(samples[name], samples.get("direct")))
        return values_per_round

    def ratios(self, metric: Metric, shape: str, name: str) -> list[float]:
        values, nginx_values = self.values(metric, shape, name), self.values(metric, shape, "nginx")
        return [a / b for a, b in zip(values, nginx_values, strict=False) if b]


def _write_requests(file: Path, requests: list[bytes]) -> None:
    with file.open("wb") as out:
        for request in requests:
            out.write(b"%d\n" % len(request))
            out.write(request)


def _measure(baseline: Baseline, workspace: Workspace, phase: Phase, shape: Shape, seconds: float) -> Sample:
    numbers = {"seconds": f"{seconds:g}", **{name: str(int(rate * seconds)) for name, rate in _PER_SECOND.items()}}
    arguments = [part.format(**numbers) for part in phase.arguments]
    file = workspace.folder / "requests"
    _write_requests(file, replace(phase, query=phase.query.format(**numbers)).requests(shape))
    cpu, before = baseline.cpu_seconds(), baseline.rss_bytes()
    process = subprocess.Popen(
        [str(workspace.load), str(baseline.port), str(file), *arguments], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.other_cores),  # noqa: PLW1509
    )  # fmt: skip
    peak = before
    while process.poll() is None:
        peak = max(peak, baseline.rss_bytes())
        try:
            process.wait(timeout=0.02 if phase.body_bytes else 0.2)
        except subprocess.TimeoutExpired:
            continue
    assert process.stdout is not None
    text = process.stdout.read()
    if not text.strip():
        raise RuntimeError(f"{baseline.name}: the load generator ended with {process.returncode}")
    return Sample(json.loads(text), baseline.cpu_seconds() - cpu, before, peak)


def _can_take(baseline: Baseline, phase: str, shape: str) -> bool:
    return not baseline.is_slow or (phase in _SLOW_PHASES and SHAPES[shape].path == baseline.target)


def _run_rounds(
    proxies: list[Baseline], workspace: Workspace, rounds: int, seconds: float, asked: list[tuple[str, str]]
) -> Run:
    run = Run()
    for number in range(rounds):
        if number:
            _restart(proxies)
        run.rounds.append({})
        for phase, shape in asked:
            samples = run.rounds[-1].setdefault(f"{phase}/{shape}", {})
            order = proxies[number % len(proxies) :] + proxies[: number % len(proxies)]
            for baseline in order:
                if _can_take(baseline, phase, shape):
                    samples[baseline.name] = _measure(baseline, workspace, _PHASES[phase], SHAPES[shape], seconds)
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


def report(run: Run, names: list[str]) -> str:
    """Markdown table: per metric, each proxy's median and its ratio to nginx with minimum and maximum."""
    measured = [(metric, shape) for metric in METRICS for shape in run.shapes(metric)]
    lines = [f"| metric | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for metric, shape in measured:
        cells = [_cell(run, metric, shape, name) for name in names]
        lines.append(f"| {metric.title}, {shape} | {' | '.join(cells)} |")
    lines.append("")
    lines += [_verdict(run, metric, shape) for metric, shape in measured if metric.threshold is not None]
    return "\n".join(lines)


def _cell(run: Run, metric: Metric, shape: str, name: str) -> str:
    values = run.values(metric, shape, name)
    if not values:
        return "-"
    text = metric.number_format.format(statistics.median(values))
    ratios = run.ratios(metric, shape, name)
    if ratios and name not in ("nginx", "direct"):
        text += f" ({statistics.median(ratios):.2f}; {min(ratios):.2f}-{max(ratios):.2f})"
    return text


def _verdict(run: Run, metric: Metric, shape: str) -> str:
    assert metric.threshold is not None
    title = f"{metric.title}, {shape}"
    values = run.values(metric, shape, "llamayard") if metric.is_absolute else run.ratios(metric, shape, "llamayard")
    if not values:
        return f"{title}: not measured"
    value = statistics.median(values)
    holds = value >= metric.threshold if metric.higher_is_better else value <= metric.threshold
    sign = ">=" if metric.higher_is_better else "<="
    return f"{'PASS' if holds else 'FAIL'}: {title}: {value:.2f} ({sign} {metric.threshold:g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each phase")
    parser.add_argument("--only", default=",".join(BASELINES), help="proxies, comma-separated")
    parser.add_argument("--phases", default=",".join(_PHASES), help="phases, comma-separated")
    parser.add_argument("--shapes", help="shapes of requests, comma-separated; by default those of each phase")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--read", type=Path, nargs="+", help="print results of --json files, measure nothing")
    args = parser.parse_args()
    if args.read:
        print(report(_read(args.read), [name for name in args.only.split(",") if name in BASELINES]))
        return 0
    phases = [name for name in args.phases.split(",") if name in _PHASES]
    shapes = [name for name in args.shapes.split(",") if name in SHAPES] if args.shapes else None
    asked = [(phase, shape) for phase in phases for shape in shapes or _PHASES[phase].shapes]
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
        run = _run_rounds(proxies, workspace, args.rounds, args.seconds, asked)
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
    print(report(run, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
