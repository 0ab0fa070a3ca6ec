"""Requests whose body cannot name a context, as on `/v1`: their server gives them the one of its instance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.actions import Reject
from router.domain.events import ModelDiscovered
from router.domain.policy import Pin, Policy
from router.domain.request import RunnerOptions, TicketId
from tests.scheduler.builders import instance
from tests.scheduler.play import Play, sized

CODER = sized("coder", 10, context_length=40_960)
OTHER = sized("other", 10, context_length=40_960)
POLICY = Policy(
    vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=2), instance_idle_seconds=30.0
)
LONG: RunnerOptions = (("num_ctx", 32_768),)


@pytest.fixture
def one() -> Play:
    return Play(1, POLICY).begin()


def _long(play: Play, context: int = 32_768) -> TicketId:
    ticket = play.arrive(CODER, (("num_ctx", context),), default_context=context)
    _work(play)
    return ticket


def _work(play: Play) -> None:
    for _ in range(3):
        play.bring_up()
        play.work_through()


def test_a_long_prompt_gets_an_instance_that_gives_its_context_by_default(one: Play) -> None:
    grant = one.grant(_long(one))
    assert (grant.context_length, grant.options) == (32_768, LONG)
    assert one.specs[grant.instance].context_length == 32_768


def test_a_context_is_a_step_and_never_more_than_the_trained_one(one: Play) -> None:
    grant = one.grant(_long(one, 40_000))
    assert (grant.context_length, one.specs[grant.instance].context_length) == (40_960, 40_960)


def test_every_shorter_request_is_served_by_the_same_replica(one: Play) -> None:
    first = one.grant(_long(one))
    one.release(first.ticket_id)
    for ticket in (
        one.arrive(CODER, default_context=0),
        one.arrive(CODER, (("num_ctx", 16_384),), default_context=16_384),
        one.arrive(CODER, is_flexible=True),
        one.arrive(CODER, LONG, is_flexible=True),
        one.arrive(CODER, LONG),
    ):
        assert one.grant(ticket).instance == first.instance
        one.release(ticket)
    assert one.loads_sent == 1


def test_a_replica_whose_context_was_named_does_not_serve_a_prompt_that_cannot_name_it(one: Play) -> None:
    """Its server would load it again with the default."""
    named = one.arrive(CODER, LONG, is_flexible=True)
    _work(one)
    one.release(named)
    grant = one.grant(_long(one))
    assert grant.instance != one.grant(named).instance
    assert one.specs[grant.instance].context_length == 32_768


def test_the_replica_with_less_context_is_idle_and_leaves_where_room_is_short() -> None:
    large = sized("large", 20, context_length=40_960)
    play = Play(1, POLICY).begin()
    short = play.arrive(large, default_context=0)
    _work(play)
    play.release(short)
    ticket = play.arrive(large, LONG, default_context=32_768)
    _work(play)
    assert play.grant(ticket).context_length == 32_768
    assert len(play.held) == 1


def test_other_models_do_not_load_into_an_instance_with_a_larger_default(one: Play) -> None:
    long = _long(one)
    wide = one.grant(long).instance
    one.release(long)
    one.ask_unload(CODER)
    _work(one)
    assert one.held == {}
    other = one.arrive(OTHER, is_flexible=True)
    _work(one)
    assert one.grant(other).instance != wide
    assert one.grant(other).context_length == 8192


def test_where_no_instance_can_be_started_it_is_refused_at_once_so_that_it_can_ask_for_less() -> None:
    fixed = Play(1, replace(POLICY, instances_on_demand=False)).begin()
    ticket = fixed.arrive(CODER, LONG, default_context=32_768)
    fixed.advance(60.0)
    assert isinstance(fixed.endings[ticket], Reject)
    assert fixed.loads_sent == 0


def test_a_pinned_context_that_no_instance_gives_by_default_is_not_loaded_for_them_over_and_over() -> None:
    policy = replace(POLICY, instances_on_demand=False, pins={"coder": Pin(context_length=16_384)})
    fixed = Play(1, policy).begin()
    ticket = fixed.arrive(CODER, default_context=0)
    _work(fixed)
    assert fixed.grant(ticket).context_length == 8192
    assert fixed.loads_sent == 1


def test_a_model_pinned_to_a_context_serves_requests_that_cannot_name_one() -> None:
    play = Play(1, replace(POLICY, pins={"coder": Pin(context_length=16_384)})).begin()
    ticket = play.arrive(CODER, default_context=0)
    _work(play)
    assert play.grant(ticket).context_length == 16_384
    play.release(ticket)
    assert play.arrive(CODER, is_flexible=True) in play.leases
    assert play.loads_sent == 1


def test_a_pinned_context_is_kept_warm_where_every_request_is_served_by_it() -> None:
    pins = {"coder": Pin(context_length=16_384, keep_warm=True)}
    play = Play(1, replace(POLICY, pins=pins)).begin()
    play.post(ModelDiscovered(CODER))
    _work(play)
    for ticket in (play.arrive(CODER, default_context=0), play.arrive(CODER, is_flexible=True)):
        assert play.grant(ticket).context_length == 16_384
        play.release(ticket)
    assert play.loads_sent == 1


@pytest.mark.parametrize("on_demand", [True, False])
@pytest.mark.parametrize("pinned", [2048, 4096, 16_384, 65_536])
@pytest.mark.parametrize("options", [(), (("num_ctx", 3000),), LONG, (("num_batch", 64),)])
@pytest.mark.parametrize("kind", ["flexible", "default context", "exact"])
def test_whatever_is_pinned_and_asked_for_one_load_serves_it(
    kind: str, options: RunnerOptions, pinned: int, on_demand: bool
) -> None:
    policy = replace(POLICY, instances_on_demand=on_demand, pins={"coder": Pin(context_length=pinned)})
    play = Play(1, policy).begin()
    if kind == "default context":
        ticket = play.arrive(CODER, default_context=0)
    else:
        ticket = play.arrive(CODER, options, is_flexible=kind == "flexible")
    _work(play)
    assert ticket in play.leases
    assert play.loads_sent == 1
