"""A snapshot is built once for each event that changes nothing, and again after every change."""

from __future__ import annotations

from router.domain.events import Arrived, Event, GpusRead, InstanceChanged, ResidencyRead, Ticked
from router.domain.instance import InstanceName, InstanceState
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.scheduler.dispatcher import Dispatcher
from router.scheduler.state import FleetState
from tests.scheduler.builders import BY_WEIGHT, gpu, instance, model, ticket

GPUS = (gpu(0, 24_000), gpu(1, 24_000))


class CountingFleet(FleetState):
    built = 0

    def build_snapshot(self, now: float) -> Snapshot:
        CountingFleet.built += 1
        return super().build_snapshot(now)


def _built_by(dispatcher: Dispatcher, event: Event, now: float) -> int:
    before = CountingFleet.built
    dispatcher.handle(event, now)
    return CountingFleet.built - before


def _dispatcher() -> Dispatcher:
    dispatcher = Dispatcher(Policy(vram_margin_bytes=0), BY_WEIGHT)
    dispatcher._fleet = CountingFleet(dispatcher._fleet.policy, BY_WEIGHT)
    dispatcher.handle(GpusRead(GPUS, 1.0), 1.0)
    for number in (0, 1):
        dispatcher.handle(InstanceChanged(instance(f"gpu{number}", number), InstanceState.READY), 1.0)
    return dispatcher


def test_an_event_that_changes_nothing_builds_one_snapshot() -> None:
    dispatcher = _dispatcher()
    assert _built_by(dispatcher, GpusRead(GPUS, 2.0), 2.0) == 1
    assert _built_by(dispatcher, Ticked(), 3.0) == 1
    assert _built_by(dispatcher, ResidencyRead(InstanceName("gpu0"), (), 4.0), 4.0) <= 1


def test_the_same_moment_gives_the_same_snapshot_until_something_changes() -> None:
    dispatcher = _dispatcher()
    first = dispatcher.snapshot(2.0)
    assert dispatcher.snapshot(2.0) is first
    assert dispatcher.snapshot(2.5) is not first
    before = dispatcher.snapshot(3.0)
    dispatcher.handle(Arrived(ticket(1, model("m", 1_000))), 3.0)
    assert dispatcher.snapshot(3.0) is not before
    assert dispatcher.snapshot(3.0).reservations
