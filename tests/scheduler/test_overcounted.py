"""Memory of another program that was measured as a model's: it is found out when that program leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import available_bytes, leaving_bytes, underestimated_bytes
from router.scheduler.placement.departures import departures
from tests.scheduler.builders import MIB, gpu, gpu_id, key, model, reservation, residency, snapshot, view
from tests.scheduler.play import Play, sized

GPU0 = gpu_id(0)
WIDE, SMALL, OTHER = sized("wide", 14), sized("small", 4), sized("other", 20)
A, B, C = model("a"), model("b"), model("c")


@pytest.fixture
def one() -> Play:
    """`WIDE` is loaded, with 5 bytes of another program booked as its own."""
    play = Play().begin()
    ticket = play.arrive(WIDE)
    play.external[GPU0] = 5
    play.work_through()
    play.release(ticket)
    assert play.snapshot().residencies[key("gpu0", WIDE)].per_gpu_bytes == (19,)
    return play


def _read(play: Play) -> None:
    play.now += 1.0
    play.read_gpus()


def test_a_booking_is_lowered_to_what_the_gpu_shows(one: Play) -> None:
    one.external[GPU0] = 0
    _read(one)
    assert one.snapshot().residencies[key("gpu0", WIDE)].per_gpu_bytes == (14,)


def test_so_is_what_was_remembered_of_such_loads(one: Play) -> None:
    assert list(one.remembered.values()) == [(19,)]
    one.external[GPU0] = 0
    _read(one)
    assert list(one.remembered.values()) == [(14,)]


def test_a_model_is_booked_with_no_less_than_its_server_reports(one: Play) -> None:
    """Its runner has died, and the router has not heard of it."""
    one.external[GPU0] = 0
    one.held[key("gpu0", WIDE)] = {GPU0: 3}
    _read(one)
    assert one.snapshot().residencies[key("gpu0", WIDE)].per_gpu_bytes == (19,)


def test_a_reading_from_before_an_unload_refutes_nothing(one: Play) -> None:
    one.external[GPU0] = 0
    one.ask_unload(WIDE)
    _read(one)
    assert one.snapshot().residencies[key("gpu0", WIDE)].per_gpu_bytes == (19,)


def test_the_room_of_a_corrected_booking_is_given_away(one: Play) -> None:
    one.external[GPU0] = 0
    small = one.arrive(SMALL)
    one.work_through()
    one.release(small)
    other = one.arrive(OTHER)
    one.now += 100.0
    one.read_gpus()
    assert set(one.unloads) == {key("gpu0", WIDE)}
    one.work_through()
    assert one.grant(other)


@st.composite
def overbooked(draw: st.DrawFn) -> tuple[Snapshot, int]:
    """One GPU with models that are booked with more than it has in use, or less, perhaps beside a busy one that was
    just loaded; and more bytes than it has free."""
    sizes = st.integers(1_000, 7_000)
    held = [residency("gpu0", each, draw(sizes)) for each in (A, B)]
    booked: list[Reservation] = []
    if draw(st.booleans()):
        held.append(residency("gpu0", C, draw(sizes), load=7, in_flight=1))
        booked.append(reservation(7, "gpu0", C, [(0, draw(sizes))], sent_at=1.0, finished_at=2.0))
    free = draw(st.integers(12_000, 24_000))
    facts = snapshot([gpu(0, free)], [view("gpu0", 0)], held, booked)
    return facts, available_bytes(facts, GPU0) + draw(st.integers(1, 12_000)) * MIB


@given(overbooked())
def test_who_leaves_makes_the_room_that_is_counted_once_they_leave(drawn: tuple[Snapshot, int]) -> None:
    """By the same accounting as before: a plan that begins has its room as soon as its departures are under way."""
    facts, size = drawn
    leaving = departures(facts, ((GPU0, size),), None, (), busy=False, young=True)
    if leaving is None:
        return
    plan = replace(reservation(8, "new", model("d"), []), evict=leaving.evict)
    planned = replace(facts, reservations={**facts.reservations, plan.load_id: plan})
    low = underestimated_bytes(facts, GPU0)  # where bookings seem low, a plan counts on a little more
    assert available_bytes(planned, GPU0) + leaving_bytes(planned, GPU0) + low >= size
