"""Which servers' loaded models are read at a poll."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.control.rest import POLLS_AT_REST, is_due, sight_of
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from tests.scheduler.builders import gpu, instance, model, residency, snapshot, view

TINY = model("tiny")
HERE, THERE = instance("gpu0", 0), instance("gpu1", 1)


def facts(*residencies: Residency, free_mib: int = 1000, changed_at: float = 0.0) -> Snapshot:
    gpus = (gpu(0, free_mib), gpu(1, 1000))
    return snapshot(gpus, [view("gpu0", 0), view("gpu1", 1)], residencies, changed_at=changed_at)


def due_after(seconds: float, at: Snapshot, seen: Snapshot | None = None) -> bool:
    return is_due(at, HERE, sight_of(seen or at, HERE, 1000.0), 1000.0 + seconds, 1.0)


def test_a_server_that_became_ready_is_read_at_the_next_poll() -> None:
    assert is_due(facts(), HERE, None, 1000.0, 1.0)


@pytest.mark.parametrize("held", [(), (residency("gpu0", TINY, 100),), (residency("gpu1", TINY, 100, in_flight=1),)])
def test_a_server_at_rest_is_read_at_every_fifth_poll(held: tuple[Residency, ...]) -> None:
    assert [due_after(seconds, facts(*held)) for seconds in (1, 2, 3, 4, 5)] == [False] * 4 + [True]


@pytest.mark.parametrize("late", [-0.1, 0.1])
def test_a_poll_that_comes_early_or_late_adds_none(late: float) -> None:
    assert [due_after(seconds + late, facts()) for seconds in (3, 4, 5)] == [False, False, True]
    assert POLLS_AT_REST == 5


@pytest.mark.parametrize(
    "moving",
    [
        residency("gpu0", TINY, 100, in_flight=1),
        residency("gpu0", TINY, 100, used_at=998.0),
        *(residency("gpu0", TINY, 100, state=state) for state in ResidencyState if state is not ResidencyState.READY),
    ],
)
def test_a_server_that_loads_unloads_or_serves_is_read_at_every_poll(moving: Residency) -> None:
    assert due_after(1, facts(moving))
    assert not due_after(1, facts(replace(moving, instance=THERE.name)))


def test_the_end_of_a_load_or_unload_is_looked_at_once() -> None:
    assert due_after(1, facts(changed_at=1000.0))
    assert not due_after(1, facts(changed_at=999.9))


@pytest.mark.parametrize(("free_mib", "due"), [(1000, False), (970, False), (936, True), (1064, True)])
def test_memory_that_changed_on_its_gpus_says_that_somebody_loaded_or_unloaded(free_mib: int, due: bool) -> None:
    assert due_after(1, facts(free_mib=free_mib), facts()) is due


def test_a_gpu_that_is_gone_counts_as_empty() -> None:
    assert is_due(snapshot(), HERE, sight_of(facts(), HERE, 1000.0), 1001.0, 1.0)
