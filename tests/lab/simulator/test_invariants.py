"""The rules notice when they are broken: the events of a sound run, with one thing made wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from router.domain.actions import Action, Grant, Load, Reject, Unload
from router.domain.events import Event
from router.domain.gpu import GpuUuid
from router.domain.model import ModelFacts
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey
from router.domain.snapshot import Snapshot
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.invariants import InvariantError, Invariants
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Baseline, Simulation

WANTED = ScenarioSpec("2x3090", "llama3.1:8b,llama3.3:70b", seconds=60.0, requests_per_second=0.3)
Wrong = Callable[[list[Action]], list[Action]]


class Doctored:
    """The router, whose snapshots the rules see changed."""

    def __init__(self, router: Llamayard, change: Callable[[Snapshot], Snapshot]) -> None:
        self._router = router
        self._change = change

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        return self._router.waiting

    @property
    def open_requests(self) -> Mapping[TicketId, Request]:
        return self._router.open_requests

    def snapshot(self) -> Snapshot:
        return self._change(self._router.snapshot())

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        return self._router.bytes_held(key)


def play(wrong: Wrong = lambda actions: actions, change: Callable[[Snapshot], Snapshot] = lambda seen: seen) -> None:
    """Plays with the rules seeing doctored actions and snapshots."""
    scenario = make_scenario(WANTED)
    rules = Invariants()

    def observe(event: Event, actions: list[Action], now: float) -> None:
        rules.check_actions(event, wrong(actions), now)

    make = make_baseline("llamayard", scenario, observer=observe)

    def watched(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        made = make(machine, models)
        assert isinstance(made, Llamayard)
        rules.watch(Doctored(made, change), machine)
        return made

    Simulation(scenario, watched).run(rules.check_state)


def test_a_sound_run_breaks_no_rule() -> None:
    play()


def test_a_ticket_that_is_granted_twice_is_noticed() -> None:
    with pytest.raises(InvariantError, match="decided twice"):
        play(lambda actions: [*actions, *(a for a in actions if isinstance(a, Grant))])


def test_a_ticket_that_is_granted_and_rejected_is_noticed() -> None:
    with pytest.raises(InvariantError, match="decided twice"):
        play(lambda actions: [*actions, *(Reject(a.ticket_id, "x", "x") for a in actions if isinstance(a, Grant))])


def test_an_unload_of_a_busy_model_is_noticed() -> None:
    loads: list[Load] = []

    def wrong(actions: list[Action]) -> list[Action]:
        loads.extend(action for action in actions if isinstance(action, Load))
        granted = [action for action in actions if isinstance(action, Grant)]
        return [*actions, *(Unload(one.instance, one.url, load.model, load.model.blob, "on a whim")
                            for one in granted for load in loads if load.instance == one.instance)]  # fmt: skip

    with pytest.raises(InvariantError, match="unloads busy"):
        play(wrong)


def test_more_than_a_gpu_holds_is_noticed() -> None:
    def grown(seen: Snapshot) -> Snapshot:
        larger = {
            key: replace(one, per_gpu_bytes=tuple((gpu, 3 * size) for gpu, size in one.per_gpu_bytes))
            for key, one in seen.reservations.items()
        }
        return replace(seen, reservations=larger)

    with pytest.raises(InvariantError, match="held and reserved"):
        play(change=grown)


def test_a_reservation_on_some_of_the_gpus_is_noticed() -> None:
    def halved(seen: Snapshot) -> Snapshot:
        halves = {key: replace(one, per_gpu_bytes=one.per_gpu_bytes[:1]) for key, one in seen.reservations.items()}
        return replace(seen, reservations=halves)

    with pytest.raises(InvariantError, match="does not cover"):
        play(change=halved)


def test_slots_that_nobody_was_granted_are_noticed() -> None:
    def taken(seen: Snapshot) -> Snapshot:
        more = {key: replace(one, in_flight=one.in_flight + 1) for key, one in seen.residencies.items()}
        return replace(seen, residencies=more)

    with pytest.raises(InvariantError, match="in flight"):
        play(change=taken)


def test_a_request_that_waits_beside_a_free_slot_is_noticed() -> None:
    def roomier(seen: Snapshot) -> Snapshot:
        return replace(seen, residencies={key: replace(one, slots=9) for key, one in seen.residencies.items()})

    with pytest.raises(InvariantError, match="waits beside a free slot"):
        play(change=roomier)
