"""Which loaded copy serves, and which cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.entities import (
    InstanceState,
    InstanceView,
    Layout,
    LayoutKind,
    Policy,
    Residency,
    ResidencyKey,
    ResidencyState,
    RunnerOptions,
    Ticket,
)
from router.core.shortway import free_copies, serving
from router.core.state import FleetState
from tests.core.builders import gpu_id, key, model, residency, ticket, view

M = model("m")
T = ticket(1, M)
READY = residency("gpu0", M, 1000)
VIEWS = (view("gpu0", 0), view("gpu1", 1))


def _serving(
    copies: Iterable[Residency],
    of: Ticket = T,
    views: Iterable[InstanceView] = VIEWS,
    draining: Iterable[ResidencyKey] = (),
) -> Residency | None:
    """The one of the copies that serves the ticket."""
    fleet = FleetState(Policy(), draining=frozenset(draining))
    fleet.instances.update((each.spec.name, each) for each in views)
    fleet.copies.update(((copy.instance, copy.blob), copy) for copy in copies)
    found = serving(fleet, free_copies(fleet, of.model.blob), of)
    return None if found is None else fleet.copies[found]


def test_a_ready_copy_with_a_free_slot_serves() -> None:
    for copy in (READY, replace(READY, in_flight=1)):
        assert _serving([copy]) is copy


@pytest.mark.parametrize(
    "copy",
    [
        replace(READY, in_flight=2),
        replace(READY, in_flight=3),
        replace(READY, options=(("num_ctx", 2048),)),
        replace(READY, state=ResidencyState.PLANNED),
        replace(READY, state=ResidencyState.LOADING),
        replace(READY, state=ResidencyState.UNLOADING),
        residency("gone", M, 1000),
    ],
)
def test_a_copy_that_is_full_or_other_or_not_there_does_not(copy: Residency) -> None:
    assert _serving([copy]) is None


@pytest.mark.parametrize("state", [state for state in InstanceState if state is not InstanceState.READY])
def test_only_a_ready_instance_serves(state: InstanceState) -> None:
    assert _serving([READY], views=[view("gpu0", 0, state=state)]) is None


def test_a_copy_whose_room_is_wanted_takes_no_new_request() -> None:
    assert _serving([READY], draining=[key("gpu0", M)]) is None


LARGER: RunnerOptions = (("num_ctx", 16_384),)
SMALLER: RunnerOptions = (("num_ctx", 2048),)
LONG = model("long", context_length=131_072)


@pytest.mark.parametrize(
    ("loaded", "asked", "flexible", "serves"),
    [
        ((), SMALLER, True, True),
        ((), SMALLER, False, False),
        ((), LARGER, True, False),
        (LARGER, (), True, True),
        (LARGER, (), False, False),
        (SMALLER, (), True, False),
        (SMALLER, SMALLER, False, True),
        ((), (("num_batch", 64),), True, True),
    ],
)
def test_who_is_not_particular_is_served_by_a_copy_with_at_least_his_context(
    loaded: RunnerOptions, asked: RunnerOptions, flexible: bool, serves: bool
) -> None:
    context = dict(loaded).get("num_ctx", 8192)
    copy = replace(residency("gpu0", LONG, 1000, options=loaded), context_length=int(context))
    found = _serving([copy], ticket(1, LONG, options=asked, is_flexible=flexible))
    assert found is (copy if serves else None)


@pytest.mark.parametrize(
    ("on", "layout", "serves"),
    [
        ("gpu0", Layout(LayoutKind.SINGLE), True),
        ("spread", Layout(LayoutKind.SINGLE), False),
        ("spread", Layout(LayoutKind.SPREAD), True),
        ("gpu0", Layout(LayoutKind.SPREAD), False),
        ("gpu0", Layout(LayoutKind.GPU, gpu_id(0)), True),
        ("gpu1", Layout(LayoutKind.GPU, gpu_id(0)), False),
        ("cpu", Layout(LayoutKind.SINGLE), False),
        ("cpu", None, True),
    ],
)
def test_who_insists_on_cards_is_served_by_no_other_copy(on: str, layout: Layout | None, serves: bool) -> None:
    views = (*VIEWS, view("spread", 0, 1), view("cpu"))
    copy = residency(on, M, *(1000 for _ in next(v for v in views if v.spec.name == on).spec.gpus))
    assert _serving([copy], ticket(1, M, layout=layout), views) is (copy if serves else None)


def test_the_copy_with_the_fewest_requests_serves_and_equal_ones_take_turns() -> None:
    one, other = residency("gpu0", M, 1000, in_flight=1), residency("gpu1", M, 1000)
    assert _serving([one, other]) is other
    assert _serving([residency("gpu0", M, 1, used_at=5.0), residency("gpu1", M, 1, used_at=4.0)]) == residency(
        "gpu1", M, 1, used_at=4.0
    )
    assert _serving([residency("gpu1", M, 1), residency("gpu0", M, 1)]) == residency("gpu0", M, 1)
    assert _serving([]) is None


COPIES = st.lists(
    st.builds(
        lambda number, busy, used: residency(f"gpu{number}", M, 1000, in_flight=busy, used_at=float(used), slots=5),
        st.integers(0, 9), st.integers(0, 4), st.integers(0, 3),
    ),
    min_size=1, unique_by=lambda copy: copy.instance,
)  # fmt: skip


@given(COPIES, st.randoms(use_true_random=False))
def test_the_same_copies_in_any_order_give_the_same_answer(copies: list[Residency], random: object) -> None:
    views = [view(f"gpu{number}", number) for number in range(10)]
    chosen = _serving(copies, views=views)
    assert chosen is not None
    assert chosen.in_flight == min(copy.in_flight for copy in copies)
    shuffled = list(copies)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert _serving(shuffled, views=views) == chosen
