"""Benchmarks the latency of scheduling decisions: one event through `Dispatcher.handle` on a saturated machine.

`make bench-decide`: 64 models and 200 waiting requests on 8 or more GPUs, by kind of event. The time is what
`router/control/controller.py` spends in the scheduler per event, including `next_wake`, without executing the actions.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.scheduling.busy_machine import BusyMachine, make_models
from router.domain.actions import Action, Grant
from router.domain.events import (
    Arrived,
    Event,
    GpusRead,
    LoadFinished,
    Released,
    ResidencyRead,
    Ticked,
    UnloadFinished,
)
from router.domain.residency import ResidencyState
from router.lab.scenarios import model_facts
from router.scheduler.dispatcher import Dispatcher

GPU_MODELS = (8, 32, 128, 512, 1000)
KINDS = ("llama3.1:8b", "llama3.2:3b", "qwen2.5:14b", "qwen2.5:7b", "qwen2.5-coder:32b", "gemma2:27b",
         "nomic-embed-text:latest", "llama3.3:70b")  # fmt: skip
LIMIT_MICROSECONDS = 50.0
_ALL, _REQUESTS = "all events", "requests and releases"


@dataclass(slots=True)
class Times:
    """Durations in nanoseconds by kind of event, recorded while `is_on`."""

    durations: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    is_on: bool = False
    clock: Callable[[], int] = time.perf_counter_ns

    def post(self, dispatcher: Dispatcher, event: Event, now: float) -> list[Action]:
        replicas = len(_replicas(dispatcher, event, now)) if self.is_on and isinstance(event, Arrived) else 0
        began = self.clock()
        actions = dispatcher.handle(event, now)
        dispatcher.next_wake()
        took = self.clock() - began
        if self.is_on:
            self.durations.setdefault(_kind(event, actions, replicas), []).append(took)
        return actions


def _replicas(dispatcher: Dispatcher, event: Arrived, now: float) -> list[object]:
    results = dispatcher.snapshot(now).residencies.values()
    return [r for r in results if r.blob == event.ticket.model.blob and r.state is not ResidencyState.UNLOADING]


def _kind(event: Event, actions: list[Action], replicas: int) -> str:
    granted = any(isinstance(action, Grant) for action in actions)
    match event:
        case Arrived():
            if granted:
                return "request, granted at once"
            return "request, waits for a slot" if replicas else "request, needs a load"
        case Released():
            return "release, next request granted" if granted else "release, no request granted"
        case GpusRead():
            return "GPU reading"
        case ResidencyRead():
            return "model list of a server"
        case LoadFinished() | UnloadFinished():
            return "load or unload finished"
        case Ticked():
            return "timer"
        case _:
            return "other"


@dataclass(frozen=True, slots=True)
class Row:
    """Latencies of one kind of event, in microseconds."""

    kind: str
    events: int
    median: float
    p95: float
    p99: float
    most: float
    share: float
    """Share of the total time of all events."""


@dataclass(frozen=True, slots=True)
class MachineResult:
    """Results for one number of GPUs."""

    gpus: int
    state: str
    rows: tuple[Row, ...]

    def row(self, kind: str) -> Row:
        return next(row for row in self.rows if row.kind == kind)

    def lines(self) -> list[str]:
        head = f"  {'event':<32}{'count':>8}{'median':>12}{'p95':>12}{'p99':>12}{'max':>12}{'share of time':>16}"
        return [f"\n{self.gpus} GPUs: {self.state}", head, *map(_line, self.rows)]


def _line(row: Row) -> str:
    figures = "".join(f"{figure:>9.1f} µs" for figure in (row.median, row.p95, row.p99, row.most))
    return f"  {row.kind:<32}{row.events:>8}{figures}{row.share:>16.0%}"


def measure(gpus: int, args: argparse.Namespace) -> MachineResult:
    """Runs a machine with this many GPUs until it is saturated, then measures."""
    times = Times(clock=time.thread_time_ns if args.cpu else time.perf_counter_ns)
    models = make_models([model_facts(name) for name in KINDS], args.models)
    machine = BusyMachine(gpus, models, args.waiting, args.seed, times.post)
    machine.play(args.warm)
    gc.collect()
    gc.freeze()  # as the router does after its start
    times.is_on = True
    machine.play(args.warm + args.seconds)
    snapshot = machine.snapshot()
    resident = {r.blob for r in snapshot.residencies.values() if r.state is ResidencyState.READY}
    state = (
        f"{len(resident)} of {args.models} models resident, {len(snapshot.residencies)} replicas on "
        f"{len(snapshot.instances)} instances, {len(machine.dispatcher.waiting)} requests waiting for "
        f"{len(snapshot.wanted)} models, {machine.rejected} rejected"
    )
    return MachineResult(gpus, state, rows_of(times.durations))


def rows_of(durations: dict[str, list[int]]) -> tuple[Row, ...]:
    """Rows from nanoseconds by kind: all events, requests and releases, then each kind, most frequent first."""
    all_durations = [duration for kind in durations.values() for duration in kind]
    by_request = [times for kind, times in durations.items() if kind.startswith(("request", "release"))]
    requests = [duration for times in by_request for duration in times]
    kinds = sorted(durations.items(), key=lambda kind: -len(kind[1]))
    return tuple(_row(kind, times, sum(all_durations))
                 for kind, times in [(_ALL, all_durations), (_REQUESTS, requests), *kinds] if times)  # fmt: skip


def _row(kind: str, times: Sequence[int], total: int) -> Row:
    ordered = sorted(times)
    p95, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000 for share in (0.95, 0.99))
    median, most = statistics.median(ordered) / 1000, ordered[-1] / 1000
    return Row(kind, len(times), median, p95, p99, most, sum(times) / total)


def main() -> int:
    """Returns 1 if the median of requests and releases exceeds 50 µs at the first number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="*", default=list(GPU_MODELS))
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=200)
    parser.add_argument("--warm", type=float, default=30.0, help="warm-up, in seconds of the machine's clock")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time, in seconds of the machine's clock")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of time, for a machine that is not idle")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    results: list[MachineResult] = []
    for gpus in args.gpus:
        results.append(measure(gpus, args))
        sys.stdout.write("\n".join(results[-1].lines()) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\nscaling: requests and releases, median and p95; all events, p99\n")
    for result in results:
        row, p99 = result.row(_REQUESTS), result.row(_ALL).p99
        sys.stdout.write(f"  {result.gpus:>5} GPUs{row.median:>10.1f} µs{row.p95:>10.1f} µs{p99:>10.1f} µs\n")
    if args.out is not None:
        rows = [{"gpus": result.gpus, "kind": row.kind, "events": row.events, "median_microseconds": row.median,
                 "p95_microseconds": row.p95, "p99_microseconds": row.p99, "max_microseconds": row.most}
                for result in results for row in result.rows]  # fmt: skip
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    first = results[0].row(_REQUESTS)
    holds = first.median <= LIMIT_MICROSECONDS
    criterion = f"median {first.median:.1f} µs <= {LIMIT_MICROSECONDS:.0f} µs at {results[0].gpus} GPUs"
    sys.stdout.write(f"\n{'PASS' if holds else 'FAIL'}  {criterion}\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
