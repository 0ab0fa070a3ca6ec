"""The invariants detect violations: a correct run in which one action or snapshot is altered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from router.domain.actions import Action, Grant, Load, Reject, Unload
from router.domain.events import Event, Ticked
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.model import ModelFacts
from router.domain.policy import CpuOverflow, Policy
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey
from router.domain.snapshot import Snapshot
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.invariants import InvariantError, Invariants, check_cpu
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Baseline, Simulation
from tests.scheduler.builders import model, residency, snapshot, ticket, view

SPEC = ScenarioSpec("2x3090", "llama3.1:8b,llama3.3:70b", seconds=60.0, requests_per_second=0.6)
AlterActions = Callable[[list[Action]], list[Action]]


class AlteredRouter:
    """A router whose snapshots are altered before they are checked."""

    def __init__(self, router: Llamayard, alter_snapshot: Callable[[Snapshot], Snapshot]) -> None:
        self._router = router
        self._change = alter_snapshot

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        return self._router.waiting

    @property
    def open_requests(self) -> Mapping[TicketId, Request]:
        return self._router.open_requests

    def snapshot(self) -> Snapshot:
        return self._change(self._router.snapshot())

    def host_free_bytes(self) -> int:
        return self._router.host_free_bytes()

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        return self._router.bytes_held(key)


def play(
    alter_actions: AlterActions = lambda actions: actions,
    alter_snapshot: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot,
) -> None:
    """Runs with the invariants checking altered actions and snapshots."""
    scenario = make_scenario(SPEC)
    invariants = Invariants()

    def observe(event: Event, actions: list[Action], now: float) -> None:
        invariants.check_actions(event, alter_actions(actions), now)

    factory = make_baseline("llamayard", scenario, observer=observe)

    def make_and_attach(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        router = factory(machine, models)
        assert isinstance(router, Llamayard)
        invariants.watch(AlteredRouter(router, alter_snapshot), machine)
        return router

    Simulation(scenario, make_and_attach).run(invariants.check_state)


def test_a_correct_run_violates_nothing() -> None:
    play()


def test_a_ticket_granted_twice_is_detected() -> None:
    with pytest.raises(InvariantError, match="decided twice"):
        play(lambda actions: [*actions, *(a for a in actions if isinstance(a, Grant))])


def test_a_ticket_granted_and_rejected_is_detected() -> None:
    with pytest.raises(InvariantError, match="decided twice"):
        play(lambda actions: [*actions, *(Reject(a.ticket_id, "x", "x") for a in actions if isinstance(a, Grant))])


def test_an_unload_of_a_busy_model_is_detected() -> None:
    loads: list[Load] = []

    def alter_actions(actions: list[Action]) -> list[Action]:
        loads.extend(action for action in actions if isinstance(action, Load))
        granted = [action for action in actions if isinstance(action, Grant)]
        return [*actions, *(Unload(one.instance, one.url, load.model, load.model.blob, "test")
                            for one in granted for load in loads if load.instance == one.instance)]  # fmt: skip

    with pytest.raises(InvariantError, match="unloads busy"):
        play(alter_actions)


def test_more_reserved_than_a_gpu_holds_is_detected() -> None:
    def grown(snapshot: Snapshot) -> Snapshot:
        larger = {
            key: replace(one, per_gpu_bytes=tuple((gpu, 3 * size) for gpu, size in one.per_gpu_bytes))
            for key, one in snapshot.reservations.items()
        }
        return replace(snapshot, reservations=larger)

    with pytest.raises(InvariantError, match="held and reserved"):
        play(alter_snapshot=grown)


def test_a_reservation_on_only_some_gpus_is_detected() -> None:
    def halved(snapshot: Snapshot) -> Snapshot:
        halves = {key: replace(one, per_gpu_bytes=one.per_gpu_bytes[:1]) for key, one in snapshot.reservations.items()}
        return replace(snapshot, reservations=halves)

    with pytest.raises(InvariantError, match="does not cover"):
        play(alter_snapshot=halved)


def test_slots_in_use_without_a_grant_are_detected() -> None:
    def taken(snapshot: Snapshot) -> Snapshot:
        more = {key: replace(one, in_flight=one.in_flight + 1) for key, one in snapshot.residencies.items()}
        return replace(snapshot, residencies=more)

    with pytest.raises(InvariantError, match="in flight"):
        play(alter_snapshot=taken)


def test_a_request_that_waits_while_a_slot_is_free_is_detected() -> None:
    def roomier(snapshot: Snapshot) -> Snapshot:
        return replace(snapshot, residencies={key: replace(one, slots=9) for key, one in snapshot.residencies.items()})

    with pytest.raises(InvariantError, match="waits despite a free slot"):
        play(alter_snapshot=roomier)


def starving_at_once(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, policy=replace(snapshot.policy, starving_after_seconds=0.5))


class OneWaits:
    """A router in which one request waits; another one for the same model is open."""

    def __init__(self, waiting: Ticket, other: Request) -> None:
        self.waiting = ((waiting, "a slot"),)
        self.open_requests = {TicketId(2): other}

    def snapshot(self) -> Snapshot:
        return snapshot([], [], policy=Policy(starving_after_seconds=75.0))

    def host_free_bytes(self) -> int:
        return 0

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        return {}


@pytest.mark.parametrize(("now", "is_starving"), [(74.0, False), (76.0, True)])
def test_a_starving_request_that_is_overtaken_is_detected(now: float, is_starving: bool) -> None:
    loaded = model("m")
    later = Request(2, "bob", 0, 0, loaded, 10, 0, 10, arrived_at=now)
    scenario = make_scenario(SPEC)
    invariants, machine = Invariants(), Simulation(scenario, make_baseline("llamayard", scenario)).machine
    invariants.watch(OneWaits(ticket(1, loaded, client="anna"), later), machine)
    granted: list[Action] = [Grant(TicketId(2), InstanceName("gpu0"), "", "", 0, 2)]
    if is_starving:
        with pytest.raises(InvariantError, match="overtakes 1 of anna"):
            invariants.check_actions(Ticked(), granted, now)
    else:
        invariants.check_actions(Ticked(), granted, now)


@pytest.mark.parametrize(
    ("margin_bytes", "in_flight", "message"),
    [(10**15, 0, "copies on the CPU leave"), (0, 2, "more than one request runs on the CPU")],
)
def test_copies_on_the_cpu_that_take_too_much_are_detected(margin_bytes: int, in_flight: int, message: str) -> None:
    cpu = replace(view("cpu"), spec=replace(view("cpu").spec, is_overflow=True))
    copy = residency("cpu", model("m"), in_flight=in_flight)

    facts = snapshot([], [cpu], [copy], policy=Policy(cpu=CpuOverflow(memory_margin_bytes=margin_bytes)))
    with pytest.raises(InvariantError, match=message):
        check_cpu(facts, 10**12, 5.0)


def test_a_starving_request_without_a_plan_is_detected() -> None:
    with pytest.raises(InvariantError, match="nothing is planned"):
        play(alter_snapshot=lambda snapshot: replace(starving_at_once(snapshot), residencies={}, reservations={}))
