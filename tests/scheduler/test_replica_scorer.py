"""Which replica serves a request, and which cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.policy import Policy
from router.domain.replica_choice import Choice, Prospect
from router.domain.request import Layout, LayoutKind, RunnerOptions, Ticket
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.scheduler.balancing.pending_work import PendingWork
from router.scheduler.balancing.replica_choice import choose, free_replicas, serving
from router.scheduler.balancing.replica_scorer import NEAR, SIDE_WEIGHT, best, waiting_seconds
from router.scheduler.balancing.throughput import Throughput
from router.scheduler.state import FleetState
from tests.scheduler.builders import OLLAMA, gpu_id, key, model, residency, ticket, view

M = model("m")
T = ticket(1, M)
READY = residency("gpu0", M, 1000)
VIEWS = (view("gpu0", 0), view("gpu1", 1))


def _serving(
    replicas: Iterable[Residency],
    of: Ticket = T,
    views: Iterable[InstanceView] = VIEWS,
    draining: Iterable[ResidencyKey] = (),
) -> Residency | None:
    """The replica that serves the ticket."""
    fleet = FleetState(Policy(), OLLAMA, draining=frozenset(draining))
    fleet.instances.update((each.spec.name, each) for each in views)
    fleet.replicas.update(((replica.instance, replica.blob), replica) for replica in replicas)
    able = serving(fleet, free_replicas(fleet, of.model.blob)[0], of)
    return fleet.replicas[able[choose(fleet, able, of, 0.0)[1].chosen]] if able else None


def test_a_ready_replica_with_a_free_slot_serves() -> None:
    for replica in (READY, replace(READY, in_flight=1)):
        assert _serving([replica]) is replica


@pytest.mark.parametrize(
    "replica",
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
def test_a_replica_that_is_full_or_different_or_not_loaded_does_not_serve(replica: Residency) -> None:
    assert _serving([replica]) is None


@pytest.mark.parametrize("state", [state for state in InstanceState if state is not InstanceState.READY])
def test_only_a_ready_instance_serves(state: InstanceState) -> None:
    assert _serving([READY], views=[view("gpu0", 0, state=state)]) is None


def test_a_draining_replica_takes_no_new_request() -> None:
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
def test_a_flexible_request_is_served_by_a_replica_with_enough_context(
    loaded: RunnerOptions, asked: RunnerOptions, flexible: bool, serves: bool
) -> None:
    context = dict(loaded).get("num_ctx", 8192)
    replica = replace(residency("gpu0", LONG, 1000, options=loaded), context_length=int(context))
    found = _serving([replica], ticket(1, LONG, options=asked, is_flexible=flexible))
    assert found is (replica if serves else None)


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
def test_a_request_with_a_layout_is_served_by_no_other_replica(on: str, layout: Layout | None, serves: bool) -> None:
    views = (*VIEWS, view("spread", 0, 1), view("cpu"))
    replica = residency(on, M, *(1000 for _ in next(v for v in views if v.spec.name == on).spec.gpus))
    assert _serving([replica], ticket(1, M, layout=layout), views) is (replica if serves else None)


PACE = Throughput(prompt_seconds=0.001, step_seconds=0.01)


PROMPT_TOKENS = 1000


def prospect(
    on: str, *, held: int = 0, in_flight: int = 0, served_last: bool = False, used_at: float = 0.0
) -> Prospect:
    return Prospect(PROMPT_TOKENS - held, in_flight, not served_last, used_at, InstanceName(on))


def test_the_replica_with_the_shortest_wait_serves() -> None:
    assert best([3.0, 1.0], [prospect("gpu0", held=500), prospect("gpu1", in_flight=1)]) == 1


def test_equal_replicas_are_ordered_by_cache_requests_client_last_use_and_name() -> None:
    five = [
        (1.1, prospect("gpu4", held=9, in_flight=1, used_at=5.0)),
        (1.0, prospect("gpu3", used_at=1.0, in_flight=1)),
        (1.0, prospect("gpu2", served_last=True, used_at=4.0)),
        (1.0, prospect("gpu1", used_at=3.0)),
        (1.0, prospect("gpu0", used_at=3.0)),
    ]
    order: list[str] = []
    while five:
        chosen = five.pop(best([seconds for seconds, _ in five], [each for _, each in five]))
        order.append(chosen[1].instance)
    assert order == ["gpu4", "gpu2", "gpu0", "gpu1", "gpu3"]


Ranked = tuple[float, Prospect]

RANKED = st.lists(
    st.builds(
        lambda number, seconds, held, busy, used: (
            seconds, prospect(f"gpu{number}", held=held, in_flight=busy, used_at=float(used))
        ),
        st.integers(0, 9), st.floats(0.001, 100.0), st.sampled_from((0, 0, 64, 1000)), st.integers(0, 4),
        st.integers(0, 3),
    ),
    min_size=1, unique_by=lambda found: found[1].instance,
)  # fmt: skip


@given(RANKED, st.randoms(use_true_random=False))
def test_the_order_of_replicas_does_not_matter_and_no_much_slower_one_is_chosen(
    ranked: list[Ranked], random: object
) -> None:
    def chosen_of(replicas: list[Ranked]) -> Ranked:
        return replicas[best([seconds for seconds, _ in replicas], [each for _, each in replicas])]

    chosen = chosen_of(ranked)
    assert chosen[0] <= min(seconds for seconds, _ in ranked) * (1 + NEAR)
    shuffled = list(ranked)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen_of(shuffled) == chosen


def test_a_choice_shows_the_expected_wait_here_and_on_the_best_other_replica() -> None:
    three = (prospect("gpu0"), prospect("gpu1", held=600), prospect("gpu2"))
    choice = Choice(1, three, (2.0, 0.5, 1.25), PROMPT_TOKENS)
    assert choice.explain() == ("; about 0.50 s of waiting, 600 tokens of the prompt in its cache, and 1.25 s on gpu2")
    assert Choice(0, three[:1], (2.0,), PROMPT_TOKENS).explain() == ""


TOKENS = st.integers(0, 8000)


@given(TOKENS, TOKENS, st.integers(0, 8), st.floats(0.0, 100.0), TOKENS)
def test_more_work_never_makes_the_wait_shorter(
    prompt: int, output: int, concurrent: int, ahead: float, more: int
) -> None:
    def waiting(**changes: float) -> float:
        facts: dict[str, float] = {"prompt": prompt, "output": output, "beside": concurrent, "ahead": ahead, **changes}
        count = int(facts["beside"])
        work = PendingWork(prompts_until=1000.0 + facts["ahead"], output_tokens=count * 100, requests=count)
        return waiting_seconds(PACE, work, int(facts["prompt"]), int(facts["output"]), count, 1000.0)

    at_least = waiting()
    assert at_least >= prompt * PACE.prompt_seconds + PACE.step_seconds
    assert waiting(prompt=prompt + more) >= at_least
    assert waiting(output=output + more) >= at_least
    assert waiting(ahead=ahead + more) >= at_least
    assert waiting(concurrent=concurrent + 1) + 1e-9 >= (at_least if concurrent else at_least - ahead)


def test_requests_are_weighed_by_their_tokens() -> None:
    """One long prompt is more work than two short ones."""
    long = PendingWork(prompts_until=1008.0, output_tokens=100, requests=1)
    two_short = PendingWork(prompts_until=1000.1, output_tokens=200, requests=2)
    args = (1000, 100)
    assert waiting_seconds(PACE, two_short, *args, 2, 1000.0) < waiting_seconds(PACE, long, *args, 1, 1000.0) + 1.0
    assert waiting_seconds(PACE, two_short, 10, 100, 2, 1000.0) < waiting_seconds(PACE, long, 10, 100, 1, 1000.0)


def test_a_long_prompt_costs_the_concurrent_streams() -> None:
    work = PendingWork(output_tokens=200, requests=2)
    alone, concurrent = (waiting_seconds(PACE, w, 4000, 0, n, 1000.0) for w, n in ((PendingWork(), 0), (work, 2)))
    assert concurrent - alone == pytest.approx(SIDE_WEIGHT * 2 * 4.0)
