"""What one decision of the core costs: the time of one event through `Dispatcher.handle`, on a machine that is full.

`make bench-decide` runs it: 64 models, 200 tickets that always wait, at 8 GPUs and more, by kind of event. The time is
what `router/control/controller.py` spends in the core for one event, the next wake included; carrying out is not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.scheduling.busy_machine import BusyMachine, some_models
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
_ALL, _REQUESTS = "all events, as they come", "requests and releases"


@dataclass(slots=True)
class Times:
    """Nanoseconds by kind of event."""

    taken: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    is_on: bool = False

    def post(self, dispatcher: Dispatcher, event: Event, now: float) -> list[Action]:
        replicas = len(_copies(dispatcher, event, now)) if self.is_on and isinstance(event, Arrived) else 0
        began = time.perf_counter_ns()
        actions = dispatcher.handle(event, now)
        dispatcher.next_wake()
        took = time.perf_counter_ns() - began
        if self.is_on:
            self.taken.setdefault(_kind(event, actions, replicas), []).append(took)
        return actions


def _copies(dispatcher: Dispatcher, event: Arrived, now: float) -> list[object]:
    found = dispatcher.snapshot(now).residencies.values()
    return [r for r in found if r.blob == event.ticket.model.blob and r.state is not ResidencyState.UNLOADING]


def _kind(event: Event, actions: list[Action], replicas: int) -> str:
    granted = any(isinstance(action, Grant) for action in actions)
    match event:
        case Arrived():
            if granted:
                return "request, served at once"
            return "request, waits for a slot" if replicas else "request, needs a load"
        case Released():
            return "release, the next is granted" if granted else "release, nobody can go on"
        case GpusRead():
            return "reading of the GPUs"
        case ResidencyRead():
            return "listing of a server"
        case LoadFinished() | UnloadFinished():
            return "end of a load or unload"
        case Ticked():
            return "time"
        case _:
            return "other"


@dataclass(frozen=True, slots=True)
class Row:
    """Events of one kind; microseconds."""

    kind: str
    events: int
    median: float
    p95: float
    share: float
    """Of the time of all."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One machine."""

    gpus: int
    state: str
    rows: tuple[Row, ...]

    def row(self, kind: str) -> Row:
        return next(row for row in self.rows if row.kind == kind)

    def lines(self) -> list[str]:
        head = f"  {'':<32}{'events':>8}{'median':>12}{'p95':>12}{'share of time':>16}"
        return [f"\n{self.gpus} gpus: {self.state}", head, *map(_line, self.rows)]


def _line(row: Row) -> str:
    return f"  {row.kind:<32}{row.events:>8}{row.median:>9.1f} µs{row.p95:>9.1f} µs{row.share:>16.0%}"


def measure(gpus: int, given: argparse.Namespace) -> Measured:
    """Plays a machine with so many GPUs until it is full, and then times it."""
    times = Times()
    models = some_models([model_facts(name) for name in KINDS], given.models)
    machine = BusyMachine(gpus, models, given.waiting, given.seed, times.post)
    machine.play(given.warm)
    gc.collect()
    gc.freeze()  # as the router does once it has started
    times.is_on = True
    machine.play(given.warm + given.seconds)
    facts = machine.snapshot()
    resident = {r.blob for r in facts.residencies.values() if r.state is ResidencyState.READY}
    state = (
        f"{len(resident)} of {given.models} models resident, {len(facts.residencies)} copies on "
        f"{len(facts.instances)} instances, {len(machine.dispatcher.waiting)} waiting for {len(facts.wanted)} models, "
        f"{machine.rejected} rejected"
    )
    return Measured(gpus, state, rows_of(times.taken))


def rows_of(taken: dict[str, list[int]]) -> tuple[Row, ...]:
    """Of nanoseconds by kind of event: all together, what requests bring, then each kind, the most frequent first."""
    everything = [each for kind in taken.values() for each in kind]
    requests = [each for kind, times in taken.items() if kind.startswith(("request", "release")) for each in times]
    kinds = sorted(taken.items(), key=lambda kind: -len(kind[1]))
    return tuple(_row(kind, times, sum(everything))
                 for kind, times in [(_ALL, everything), (_REQUESTS, requests), *kinds] if times)  # fmt: skip


def _row(kind: str, times: Sequence[int], whole: int) -> Row:
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Row(kind, len(times), statistics.median(ordered) / 1000, p95 / 1000, sum(times) / whole)


def main() -> int:
    """1 where the median of requests and releases at 8 GPUs is above 50 µs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="*", default=list(GPU_MODELS))
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=200)
    parser.add_argument("--warm", type=float, default=30.0, help="seconds of the machine's clock before it is timed")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of the machine's clock that are timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    given = parser.parse_args()
    found: list[Measured] = []
    for gpus in given.gpus:
        found.append(measure(gpus, given))
        sys.stdout.write("\n".join(found[-1].lines()) + "\n")
        sys.stdout.flush()
    sys.stdout.write("\ngrowth, median and p95 of requests and releases:\n")
    for one in found:
        row = one.row(_REQUESTS)
        sys.stdout.write(f"  {one.gpus:>5} GPUs{row.median:>10.1f} µs{row.p95:>10.1f} µs\n")
    if given.out is not None:
        rows = [{"gpus": one.gpus, "kind": row.kind, "events": row.events, "median_microseconds": row.median,
                 "p95_microseconds": row.p95} for one in found for row in one.rows]  # fmt: skip
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    first = found[0].row(_REQUESTS)
    holds = first.median <= LIMIT_MICROSECONDS
    words = f"median {first.median:.1f} µs <= {LIMIT_MICROSECONDS:.0f} µs at {found[0].gpus} GPUs"
    sys.stdout.write(f"\n{'holds ' if holds else 'BROKEN'}  {words}\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
