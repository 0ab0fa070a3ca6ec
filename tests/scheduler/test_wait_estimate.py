"""Positions and waits of waiting tickets, with numbers that are easy to check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceState
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Policy, SchedulerConstants
from router.domain.request import Layout, LayoutKind, TicketId
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Demand, Snapshot
from router.scheduler.placement.cost import reload_seconds, worth_of_load
from router.scheduler.placement.placement import MustWait
from router.scheduler.queue.wait_estimate import QueueLine, WaitEstimate, wait_estimates
from tests.scheduler.builders import MIB, gpu, key, model, reservation, residency, snapshot, ticket, view
from tests.scheduler.play import Play, sized

A, B = model("a", 3000), model("b", 1000)
POLICY = Policy(
    vram_margin_bytes=0, constants=SchedulerConstants(load_fixed_seconds=1.0, load_bytes_per_second=1000.0 * MIB)
)
"""`a` loads in four seconds, `b` in two."""
LOADS_IN = 4.0


def _facts(*replicas: Residency, held_seconds: Mapping[str, float] | None = None, **changes: object) -> Snapshot:
    """Three instances; `held_seconds`: how long a request of each model holds its slot."""
    views = [view(f"gpu{number}", number) for number in range(3)]
    seconds = {A.name: 10.0, B.name: 20.0} if held_seconds is None else held_seconds
    demand = {of.blob: Demand(1.0, 0.0, seconds.get(of.name)) for of in (A, B)}
    return replace(snapshot([], views, replicas, policy=POLICY), **{"demand": demand, **changes})


def _line(count: int, of: ModelFacts = A, first: int = 1, held: MustWait | None = None, **how: object) -> QueueLine:
    tickets = [ticket(number, of, arrived_at=1000.0, **how) for number in range(first, first + count)]  # type: ignore[arg-type]
    return QueueLine(tickets, held)


def _positions_and_waits(facts: Snapshot, *lines: QueueLine) -> list[tuple[int, float | None]]:
    """Positions and waits, in the order in which they are served."""
    found = wait_estimates(facts, lines, {})
    return [(found[each.id].position, found[each.id].expected_wait_seconds) for line in lines for each in line.tickets]


def _waits(facts: Snapshot, *lines: QueueLine) -> list[float | None]:
    return [wait for _, wait in _positions_and_waits(facts, *lines)]


# --- slots of loaded replicas -----------------------------------------------------------------------------------


def test_a_running_request_takes_half_a_service_time_more_and_each_waiting_one_a_whole() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1))
    assert _positions_and_waits(facts, _line(3)) == [(1, 5.0), (2, 15.0), (3, 25.0)]


def test_slots_and_replicas_share_the_wait() -> None:
    four = _facts(residency("gpu0", A, 3000, slots=4, in_flight=4))
    assert _waits(four, _line(5)) == [2.0, 4.0, 6.0, 8.0, 12.0]
    two = _facts(*(residency(f"gpu{number}", A, 3000, slots=1, in_flight=1) for number in range(2)))
    assert _waits(two, _line(4)) == [5.0, 5.0, 15.0, 15.0]


def test_the_wait_for_a_busy_slot_is_unknown_until_a_request_has_ended() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=2, in_flight=2), held_seconds={})
    assert _positions_and_waits(facts, _line(2)) == [(1, None), (2, None)]


def test_tickets_for_another_model_are_not_ahead() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1), residency("gpu1", B, 1000, slots=1, in_flight=1))
    assert _positions_and_waits(facts, _line(2), _line(2, B, first=3)) == [(1, 5.0), (2, 15.0), (1, 10.0), (2, 30.0)]


def test_a_ticket_of_an_earlier_group_for_the_same_replica_is_ahead() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1))
    assert _positions_and_waits(facts, _line(2), _line(1, first=3, is_flexible=True)) == [
        (1, 5.0),
        (2, 15.0),
        (3, 25.0),
    ]


def test_a_ticket_for_another_layout_is_not_ahead() -> None:
    facts = _facts(*(residency(f"gpu{number}", A, 3000, slots=1, in_flight=1) for number in range(2)))
    there = [Layout(LayoutKind.GPU, gpu) for spec in ("gpu0", "gpu1") for gpu in facts.instances[spec].spec.gpus]  # type: ignore[index]
    assert (
        _positions_and_waits(facts, *(_line(1, first=number, layout=where) for number, where in enumerate(there)))
        == [(1, 5.0)] * 2
    )


def test_a_draining_replica_gives_no_slot() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1), draining=frozenset({key("gpu0", A)}))
    assert _positions_and_waits(facts, _line(1)) == [(1, None)]


# --- loading replicas ---------------------------------------------------------------------------------------------


def _coming(state: ResidencyState, **reserved: object) -> Snapshot:
    """`a` on its way to `gpu0`; `b` is busy on `gpu1`, and idle on `gpu2`."""
    booked = replace(reservation(1, "gpu0", A, [(0, 3000)], made_at=990.0), **reserved)
    others = residency("gpu1", B, 1000, in_flight=1), residency("gpu2", B, 1000)
    facts = _facts(residency("gpu0", A, 3000, state=state, load=1), *others)
    return replace(facts, reservations={booked.load_id: booked})


def test_a_running_load_gives_its_slots_at_its_expected_end() -> None:
    facts = _coming(ResidencyState.LOADING, sent_at=999.0)
    assert _positions_and_waits(facts, _line(3)) == [(1, 3.0), (2, 3.0), (3, 13.0)]
    assert _waits(replace(facts, demand={}), _line(3)) == [3.0, 3.0, None]


def test_the_wait_for_an_overdue_load_is_unknown() -> None:
    assert _waits(_coming(ResidencyState.LOADING, sent_at=1000.0 - LOADS_IN), _line(2)) == [None, None]


@pytest.mark.parametrize(("leaves", "seconds"), [((), 0.0), (("gpu2",), 0.0), (("gpu1", "gpu2"), 10.0)])
def test_a_planned_load_begins_after_its_evictions(leaves: tuple[str, ...], seconds: float) -> None:
    facts = _coming(ResidencyState.PLANNED, evict=tuple(key(name, B) for name in leaves))
    assert _waits(facts, _line(1)) == [seconds + LOADS_IN]


def test_the_wait_is_unknown_if_the_service_time_of_a_busy_eviction_is() -> None:
    facts = _coming(ResidencyState.PLANNED, evict=(key("gpu1", B),))
    assert _waits(replace(facts, demand={}), _line(1)) == [None]


# --- models that have no place yet ---------------------------------------------------------------------------------


def _without_place(held: MustWait | None, waited: float = 0.0, **changes: Any) -> list[float | None]:
    facts = _facts(residency("gpu1", B, 1000, in_flight=1), now=1000.0 + waited, **changes)
    return _waits(facts, _line(3, held=held))


def _with_demand(requests_at_once: float) -> dict[BlobDigest, Demand]:
    """A recent demand of `b` that keeps this number of slots busy, for twenty seconds per request."""
    rate = requests_at_once / 20.0
    weight = rate * POLICY.constants.demand_half_life_seconds / math.log(2.0)
    return {A.blob: Demand(1.0, 0.0, 10.0), B.blob: Demand(weight, 1000.0, 20.0)}


def test_busy_models_in_the_way_become_idle_later_with_more_demand_until_drained() -> None:
    held = MustWait("", (key("gpu1", B),))
    assert _without_place(held, demand=_with_demand(0.0)) == [10.0 + LOADS_IN, 10.0 + LOADS_IN, 20.0 + LOADS_IN]
    memoise = _without_place(held, demand=_with_demand(1.0))[0]
    assert memoise == pytest.approx(10.0 * math.e + LOADS_IN)
    stops = POLICY.constants.drain_after_seconds + 10.0 + LOADS_IN
    assert _without_place(held, demand=_with_demand(9.0))[0] == stops
    assert _without_place(held, demand=_with_demand(9.0), waited=20.0)[0] == stops - 20.0
    assert _without_place(held, demand=_with_demand(9.0), draining=frozenset(held.drain))[0] == 10.0 + LOADS_IN


def test_a_model_over_several_gpus_waits_less_for_its_room() -> None:
    gpus = {each.uuid: each for each in (gpu(number, 2000, 2000) for number in range(2))}
    share = POLICY.constants.large_wait_share
    assert _without_place(MustWait(""), gpus=gpus)[0] == share * POLICY.starving_after_seconds + LOADS_IN
    busy, always = MustWait("", (key("gpu1", B),)), _with_demand(9.0)
    assert (
        _without_place(busy, gpus=gpus, demand=always)[0]
        == share * POLICY.constants.drain_after_seconds + 10.0 + LOADS_IN
    )


def test_a_wait_includes_the_next_requests_of_clients_ahead() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1))
    weight = (
        0.05 * POLICY.constants.demand_half_life_seconds / math.log(2.0)
    )  # half of what one slot of ten seconds can do
    facts = replace(facts, demand={A.blob: Demand(weight, 1000.0, 10.0)}, now=1000.0)
    line = QueueLine([ticket(number, A, arrived_at=1000.0, client=client) for number, client in enumerate("xyx", 1)])
    assert _waits(facts, line) == pytest.approx([5.0, 15.0 / (1 - 0.5 / 2), 25.0 / (1 - 0.5 / 2)])
    assert _waits(facts, QueueLine(line.tickets[::2])) == [5.0, 15.0]


def test_idle_models_in_the_way_are_evicted_when_the_wait_reaches_their_price() -> None:
    facts, line = _facts(), _line(2)
    worth = worth_of_load(facts, A, line.tickets)
    lacking = 8.0 * POLICY.constants.wait_weight * len(line.tickets)
    assert _waits(facts, replace(line, held=MustWait("", price=worth + lacking))) == [pytest.approx(8.0 + LOADS_IN)] * 2
    assert _waits(facts, replace(line, held=MustWait("", price=worth + 1e6)))[0] == (
        POLICY.starving_after_seconds + LOADS_IN
    )


def test_a_starving_ticket_gets_its_place_or_its_wait_is_unknown() -> None:
    assert _without_place(MustWait(""))[0] == POLICY.starving_after_seconds + LOADS_IN
    assert _without_place(MustWait(""), waited=POLICY.starving_after_seconds) == [None] * 3


def test_the_wait_is_unknown_before_the_first_search_and_without_servers() -> None:
    assert _without_place(None) == [None] * 3
    down = {name: replace(each, state=InstanceState.BACKOFF) for name, each in _facts().instances.items()}
    assert _without_place(MustWait(""), instances=down) == [None] * 3


def test_a_ticket_has_a_reason_before_its_first_search() -> None:
    facts = _facts(residency("gpu0", A, 3000, slots=1, in_flight=1))
    lines = [_line(2), _line(1, B, first=3, held=MustWait("waits for room"))]
    said = [each.reason for each in wait_estimates(facts, lines, {TicketId(1): "as told"}).values()]
    assert said == ["as told", "1 of 1 slots are in use on gpu0", "waits for room"]


# --- random situations ---------------------------------------------------------------------------------------------

STATES = [ResidencyState.READY, ResidencyState.LOADING, ResidencyState.PLANNED, ResidencyState.UNLOADING]


@st.composite
def _situations(draw: st.DrawFn) -> tuple[Snapshot, list[QueueLine]]:
    replicas: list[Residency] = []
    booked = {}
    for number in range(3):
        for of in draw(st.sampled_from([(), (A,), (B,), (A, B)])):
            state, slots = draw(st.sampled_from(STATES)), draw(st.integers(1, 4))
            busy = draw(st.integers(0, slots)) if state is ResidencyState.READY else 0
            load = len(replicas)
            replicas.append(residency(f"gpu{number}", of, 1000, state=state, slots=slots, in_flight=busy, load=load))
            if state in (ResidencyState.LOADING, ResidencyState.PLANNED):
                made = reservation(load, f"gpu{number}", of, [(number, 1000)], made_at=980.0)
                sent = draw(st.floats(980.0, 1000.0)) if state is ResidencyState.LOADING else None
                booked[made.load_id] = replace(made, sent_at=sent, evict=draw(st.sampled_from([(), (key("gpu1", B),)])))
    seconds = st.one_of(st.none(), st.floats(0.0, 100.0))
    facts = replace(
        _facts(*replicas, held_seconds={}, now=1000.0 + draw(st.floats(0.0, 120.0))),
        reservations=booked,
        demand={of.blob: Demand(1.0, 0.0, draw(seconds)) for of in (A, B)},
        draining=frozenset(draw(st.sets(st.sampled_from([key("gpu0", A), key("gpu1", B)])))),
    )
    held = st.one_of(st.none(), st.builds(MustWait, st.just("")), st.just(MustWait("", (key("gpu1", B),))),
                     st.builds(MustWait, st.just(""), price=st.floats(0.0, 200.0)))  # fmt: skip
    lines = [_line(draw(st.integers(0, 6)), of, 10 * at, draw(held)) for at, of in enumerate((A, B, A), 1)]
    return facts, lines


def _lasting(waits: Iterable[float | None]) -> list[float]:
    return [float("inf") if wait is None else wait for wait in waits]


@given(_situations())
def test_in_a_line_positions_and_waits_grow_and_results_are_deterministic(
    situation: tuple[Snapshot, list[QueueLine]],
) -> None:
    facts, lines = situation
    found = wait_estimates(facts, lines, {TicketId(10): "because"})
    assert all(each.reason == "because" for number, each in found.items() if number == 10)
    assert list(found) == [each.id for line in lines for each in line.tickets]
    for line in lines:
        own = [found[each.id] for each in line.tickets]
        if own:
            assert [each.position for each in own] == list(range(own[0].position, own[0].position + len(own)))
        waits = _lasting(each.expected_wait_seconds for each in own)
        assert waits == sorted(waits)
        assert all(wait >= 0.0 for wait in waits)
    assert wait_estimates(replace(facts), lines, {TicketId(10): "because"}) == found


# --- compared with actual waits --------------------------------------------------------------------------------------


HOLDS_SECONDS = 10.0


def _let_run(play: Play, seconds: float, granted: dict[TicketId, float]) -> None:
    """Lets each request hold its slot for ten seconds; `granted`: when each got it."""
    until = play.now + seconds
    while play.now < until:
        for number in list(play.leases):
            if play.now - granted.setdefault(number, play.now) >= HOLDS_SECONDS:
                play.release(number)
        play.advance(0.5)


def _with_one_served(play: Play, of: ModelFacts) -> Play:
    """Loads the model and ends one request of it."""
    play.arrive(of)
    play.work_through()
    _let_run(play, 2 * HOLDS_SECONDS, {})
    return play


def test_estimates_in_the_queue_are_right_within_half_a_service_time() -> None:
    small, granted = sized("small", 10), dict[TicketId, float]()
    play = _with_one_served(Play(1).begin(), small)
    for _ in range(2):
        play.arrive(small)
        _let_run(play, HOLDS_SECONDS / 2 - 0.5, granted)
    waiting, asked_at = [play.arrive(small) for _ in range(7)], play.now
    said = [play.wait_estimate(number) for number in waiting]
    _let_run(play, 60.0, granted)
    assert [each.position for each in said] == [1, 2, 3, 4, 5, 6, 7]
    came = [granted[number] - asked_at for number in waiting]
    assert came == pytest.approx([each.expected_wait_seconds for each in said], abs=HOLDS_SECONDS / 2)


def test_estimates_before_a_load_are_right_once_busy_models_are_unloaded() -> None:
    small, large = sized("small", 16), sized("large", 20)
    play = _with_one_served(Play(1).begin(), small)
    running = play.arrive(small)
    waiting = play.arrive(large)
    loads_in = reload_seconds(play.snapshot(), large)
    said = play.wait_estimate(waiting)
    assert said.expected_wait_seconds == pytest.approx(HOLDS_SECONDS / 2 + loads_in, rel=0.05)
    assert (said.position, said.reason) == (1, play.reason(waiting))
    play.advance(play.policy.constants.drain_after_seconds)
    assert play.wait_estimate(waiting).expected_wait_seconds == pytest.approx(HOLDS_SECONDS / 2 + loads_in, abs=0.5)
    play.release(running)
    assert play.wait_estimate(waiting).expected_wait_seconds == pytest.approx(loads_in, abs=0.1)
    play.work_through()
    assert play.grant(waiting).instance == "gpu0"


def test_the_estimated_order_is_the_serving_order() -> None:
    play, small = Play(1, slots=1).begin(), sized("small", 10)
    play.arrive(small)
    play.work_through()
    numbers = [play.arrive(small, client=client) for client in ("busy", "busy", "new")]
    assert [play.wait_estimate(number).position for number in numbers] == [1, 3, 2]


def test_other_options_of_the_same_weights_wait_for_the_running_ones_and_a_load() -> None:
    small = sized("small", 20)
    play = _with_one_served(Play(1, slots=1).begin(), small)
    play.arrive(small)
    waiting = play.arrive(small, options=(("num_ctx", 2048),))
    play.advance(play.policy.constants.drain_after_seconds)
    found = play.wait_estimate(waiting)
    assert found == WaitEstimate(1, found.expected_wait_seconds, play.reason(waiting))
    assert found.expected_wait_seconds == pytest.approx(
        HOLDS_SECONDS / 2 + play.policy.constants.load_fixed_seconds, abs=0.5
    )


def test_a_ticket_with_an_unknown_wait_has_a_position() -> None:
    assert wait_estimates(_facts(), [QueueLine([ticket(1, A)])], {}) == {TicketId(1): WaitEstimate(1, None)}
