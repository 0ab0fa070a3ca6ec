"""What `explain` says is what the dispatcher then does; each candidate has its reason and price."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.domain.actions import Grant, Reject
from router.domain.events import ShutdownBegan
from router.domain.explanation import Explanation, Outcome, Verdict
from router.domain.ids import LoadId
from router.domain.instance import InstanceState
from router.domain.policy import Pin, Policy
from router.domain.request import TicketId
from router.domain.residency import ResidencyState
from tests.scheduler.builders import gpu_id
from tests.scheduler.play import Play, sized
from tests.scheduler.test_unasked import LARGE, rest_begins, small_is_loaded

SMALL, OTHER, THIRD = sized("small", 10), sized("other", 10), sized("third", 10)
WHOLE, PAIR, NEVER = sized("whole", 20), sized("pair", 40), sized("never", 100)
MODELS = (SMALL, OTHER, THIRD, WHOLE, PAIR, NEVER)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, len(MODELS) - 1)),
        st.tuples(st.just("arrive"), st.integers(0, len(MODELS) - 1)),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("work"), st.integers(1, 3)),
        st.tuples(st.just("pass"), st.sampled_from((1, 20, 80))),
    ),
    max_size=25,
)


def _agree(play: Play, said: Explanation, ticket: TicketId, known: Collection[LoadId]) -> None:
    ending = play.endings.get(ticket)
    new = [r for load, r in play.snapshot().reservations.items() if load not in known]
    match said.outcome:
        case Outcome.SERVE:
            assert isinstance(ending, Grant)
            assert ending.instance == said.instance
        case Outcome.REFUSE:
            assert isinstance(ending, Reject)
            assert (ending.code, ending.message) == (said.error_code, said.reason)
        case Outcome.LOAD:
            assert ending is None
            assert [(r.instance, r.per_gpu_bytes) for r in new][:1] == [
                (said.instance, tuple(zip(said.gpus, said.candidates[0].per_gpu_bytes, strict=True)))
            ]
            assert new[0].evict == tuple((each.instance, each.blob) for each in said.leaving)
            moved = {each.moves_to for each in said.leaving} - {None}
            assert {r.instance for r in new[1:]} == moved
        case Outcome.WAIT:
            assert ending is None
            assert new == []


@given(STEPS, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_dispatcher_does_what_was_explained(steps: list[tuple[str, int]], gpus: int) -> None:
    play = Play(gpus).begin()
    for step, value in steps:
        if step == "arrive":
            known = set(play.snapshot().reservations)
            said = play.explain(MODELS[value])
            is_first = not play.waiting
            ticket = play.arrive(MODELS[value])
            if is_first:  # otherwise others, whom each event may serve first, take what it would have got
                _agree(play, said, ticket, known)
        elif step == "release" and play.leases:
            play.release(list(play.leases)[value % len(play.leases)])
        elif step == "cancel" and play.waiting:
            play.cancel(list(play.waiting)[value % len(play.waiting)])
        elif step == "work":
            play.work_through(value)
        else:
            play.advance(value)


def test_a_loaded_model_serves_at_once() -> None:
    play = Play(1).begin()
    play.arrive(SMALL)
    play.work_through()
    said = play.explain(SMALL)
    assert (said.outcome, said.instance, said.expected_wait_seconds) == (Outcome.SERVE, "gpu0", 0.0)
    assert said.reason.startswith("1 of 2 slots are in use; loaded there because: gpu0: ")
    assert [(r.instance, r.serves, r.in_flight) for r in said.replicas] == [("gpu0", True, 1)]


def test_who_leaves_and_every_candidate_is_named() -> None:
    play = Play(2).begin()
    play.arrive(WHOLE)
    play.work_through()
    small = play.arrive(SMALL)
    play.work_through()
    play.release(small)
    said = play.explain(sized("new", 20))
    verdicts = {report.instance: report.verdict for report in said.candidates}
    assert (said.outcome, said.instance) == (Outcome.LOAD, "gpu1")
    assert verdicts == {"gpu1": Verdict.EVICT, "gpu0": Verdict.BUSY, "spread": Verdict.LARGER}
    assert [(each.name, each.instance) for each in said.leaving] == [("small", "gpu1")]
    assert said.expected_wait_seconds is not None
    assert said.load_seconds == said.expected_wait_seconds


def test_a_wait_says_for_what_and_how_long() -> None:
    play = Play(1, slots=1).begin()
    play.arrive(SMALL)
    play.work_through()
    play.now += 10.0
    play.release(next(iter(play.leases)))
    play.arrive(SMALL)
    play.arrive(SMALL)
    said = play.explain(SMALL)
    assert (said.outcome, said.position) == (Outcome.WAIT, 2)
    assert said.reason == "1 of 1 slots are in use on gpu0"
    assert said.expected_wait_seconds is not None
    assert said.expected_wait_seconds > 0


def test_candidates_that_rules_exclude_say_which() -> None:
    policy = Policy(vram_margin_bytes=0, pins={"small": Pin(gpus=(gpu_id(1),))})
    play = Play(2, policy).begin()
    said = play.explain(SMALL)
    excluded = {str(r.instance): r.reason for r in said.candidates if r.verdict is Verdict.EXCLUDED}
    assert said.instance == "gpu1"
    assert excluded.keys() == {"gpu0", "spread"}
    assert "pinned elsewhere" in excluded["gpu0"]


def test_a_model_that_fits_nowhere_is_refused_with_every_shortfall() -> None:
    said = Play(2).begin().explain(NEVER)
    assert (said.outcome, said.error_code) == (Outcome.REFUSE, "model_too_large")
    assert {report.verdict for report in said.candidates} == {Verdict.TOO_SMALL}


def test_a_full_queue_and_a_shutdown_refuse() -> None:
    play = Play(1, Policy(vram_margin_bytes=0, queue_limit=1)).begin()
    play.arrive(SMALL)
    assert play.explain(OTHER).error_code == "queue_full"
    play.post(ShutdownBegan())
    assert play.explain(OTHER).error_code == "shutting_down"


def test_without_a_running_instance_it_says_so() -> None:
    play = Play(1).begin()
    play.change_instance("gpu0", InstanceState.FATAL, "broken")
    said = play.explain(SMALL)
    assert (said.outcome, said.error_code) == (Outcome.REFUSE, "no_instance")
    assert "gpu0 is fatal (broken)" in said.reason


@pytest.mark.parametrize("is_sent", [True, False])
def test_a_load_that_nobody_waits_for_gives_way(is_sent: bool) -> None:
    play = small_is_loaded()
    if is_sent:
        assert rest_begins(play)
    else:
        play.advance(1.5)
        play.read_gpus()
        assert play.state("spread", LARGE) is ResidencyState.PLANNED
    known = set(play.snapshot().reservations)
    said = play.explain(OTHER)
    ticket = play.arrive(OTHER)
    assert said.outcome is Outcome.LOAD
    _agree(play, said, ticket, known)


# --- past placements --------------------------------------------------------------------------------------------


def test_a_placement_is_told_later_with_the_facts_of_its_time() -> None:
    play = Play(2).begin()
    play.arrive(WHOLE)
    play.work_through()
    small = play.arrive(SMALL)
    play.work_through()
    play.release(small)
    said = play.explain(sized("new", 20))
    new = play.arrive(sized("new", 20))
    play.work_through()
    play.release(new)
    play.ask_unload(WHOLE)
    play.work_through()
    told = play.explain_placement(new)
    assert told is not None
    assert (told.instance, told.reason, told.leaving) == (said.instance, said.reason, said.leaving)
    assert told.candidates == said.candidates
    assert told.worth_seconds == said.worth_seconds


def test_a_further_replica_is_told_too() -> None:
    play = Play(2, slots=1).begin()
    play.arrive(SMALL)
    play.work_through()
    waiting = [play.arrive(SMALL) for _ in range(4)]
    told = play.explain_placement(waiting[-1]) or play.explain_placement(waiting[0])
    assert told is not None
    assert (told.instance, "a further replica" in told.reason) == ("gpu1", True)
    assert {str(r.instance): r.verdict for r in told.candidates}["gpu0"] is Verdict.HAS_MODEL


def test_a_request_that_needed_no_load_has_no_placement() -> None:
    play = Play(1).begin()
    play.arrive(SMALL)
    play.work_through()
    assert play.explain_placement(play.arrive(SMALL)) is None


def test_only_the_latest_placements_are_kept() -> None:
    play = Play(1).begin()
    first = play.arrive(WHOLE)
    play.work_through()
    for number in range(40):
        play.release(next(iter(play.leases)))
        play.arrive(sized(f"m{number}", 20))
        play.work_through()
    assert play.explain_placement(first) is None
