"""Which loaded copy serves, and which cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.balance import can_serve, pick
from router.core.entities import InstanceState, Layout, LayoutKind, Residency, ResidencyState, RunnerOptions
from tests.core.builders import card, gpu_id, key, model, residency, snapshot, ticket, view

M = model("m")
T = ticket(1, M)
READY = residency("gpu0", M, 1000)
VIEWS = (view("gpu0", 0), view("gpu1", 1))


def test_a_ready_copy_with_a_free_slot_serves() -> None:
    facts = snapshot([card(0, 100)], VIEWS, [READY])
    assert can_serve(facts, READY, T)
    assert can_serve(facts, replace(READY, in_flight=1), T)


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
    assert not can_serve(snapshot([card(0, 100)], VIEWS, [copy]), copy, T)


@pytest.mark.parametrize("state", [state for state in InstanceState if state is not InstanceState.READY])
def test_only_a_ready_instance_serves(state: InstanceState) -> None:
    assert not can_serve(snapshot([card(0, 100)], [view("gpu0", 0, state=state)], [READY]), READY, T)


def test_a_copy_whose_room_is_wanted_takes_no_new_request() -> None:
    facts = snapshot([card(0, 100)], VIEWS, [READY], draining=[key("gpu0", M)])
    assert not can_serve(facts, READY, T)


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
    facts = snapshot([card(0, 100)], VIEWS, [copy])
    assert can_serve(facts, copy, ticket(1, LONG, options=asked, is_flexible=flexible)) is serves


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
    facts = snapshot([card(0, 100), card(1, 100)], views, [copy])
    assert can_serve(facts, copy, ticket(1, M, layout=layout)) is serves


def test_the_copy_with_the_fewest_requests_serves_and_equal_ones_take_turns() -> None:
    one, other = residency("gpu0", M, 1000, in_flight=1), residency("gpu1", M, 1000)
    assert pick([one, other]) is other
    assert pick([residency("gpu0", M, 1, used_at=5.0), residency("gpu1", M, 1, used_at=4.0)]) == residency(
        "gpu1", M, 1, used_at=4.0
    )
    assert pick([residency("gpu1", M, 1), residency("gpu0", M, 1)]) == residency("gpu0", M, 1)
    assert pick([]) is None


COPIES = st.lists(
    st.builds(
        lambda number, busy, used: residency(f"gpu{number}", M, 1000, in_flight=busy, used_at=float(used)),
        st.integers(0, 9), st.integers(0, 4), st.integers(0, 3),
    ),
    min_size=1, unique_by=lambda copy: copy.instance,
)  # fmt: skip


@given(COPIES, st.randoms(use_true_random=False))
def test_the_same_copies_in_any_order_give_the_same_answer(copies: list[Residency], random: object) -> None:
    chosen = pick(copies)
    assert chosen is not None
    assert chosen.in_flight == min(copy.in_flight for copy in copies)
    shuffled = list(copies)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pick(shuffled) == chosen
