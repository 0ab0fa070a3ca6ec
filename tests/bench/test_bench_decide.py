"""The decision benchmark: a saturated machine and the figures derived from its timings."""

from __future__ import annotations

from bench.scheduling.bench_decide import KINDS, rows_of
from bench.scheduling.busy_machine import BusyMachine, make_models
from router.domain.actions import Action, Grant, Load
from router.domain.events import Event
from router.domain.residency import ResidencyState
from router.lab.scenarios import model_facts
from router.scheduler.dispatcher import Dispatcher

WAITING = 40


def play(seed: int, seconds: float) -> tuple[BusyMachine, list[str]]:
    decisions: list[str] = []

    def post(dispatcher: Dispatcher, event: Event, now: float) -> list[Action]:
        actions = dispatcher.handle(event, now)
        decisions.extend(f"{now} {action}" for action in actions if isinstance(action, Grant | Load))
        return actions

    machine = BusyMachine(2, make_models([model_facts(name) for name in KINDS], 16), WAITING, seed, post)
    machine.play(seconds)
    return machine, decisions


def test_the_queue_stays_full_while_models_load_and_requests_are_served() -> None:
    machine, decisions = play(1, 30.0)
    assert len(machine.dispatcher.waiting) == WAITING
    assert machine.rejected == 0
    assert sum("Grant" in line for line in decisions) > 20
    replicas = machine.snapshot().residencies.values()
    assert {r.blob for r in replicas if r.state is ResidencyState.READY}


def test_the_same_seed_is_the_same_machine() -> None:
    assert play(2, 10.0)[1] == play(2, 10.0)[1]
    assert play(2, 10.0)[1] != play(3, 10.0)[1]


def test_requests_and_releases_are_counted_together_and_separately() -> None:
    taken = {"request, waits for a slot": [1000, 3000], "release, no request granted": [5000], "timer": [91_000]}
    rows = {row.kind: (row.events, row.median, row.share) for row in rows_of(taken)}
    assert rows["requests and releases"] == (3, 3.0, 0.09)
    assert rows["all events"] == (4, 4.0, 1.0)
    assert rows["timer"] == (1, 91.0, 0.91)


def test_the_slowest_hundredth_and_the_slowest_are_told_apart() -> None:
    row = rows_of({"timer": [*range(1000, 100_000, 1000), 5_000_000]})[0]
    assert (row.median, row.p95, row.p99, row.most) == (50.5, 96.0, 5000.0, 5000.0)
