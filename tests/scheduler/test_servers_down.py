"""Requests for a model whose servers are down wait for a short time, and are then refused with a time to retry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.instance import InstanceState
from router.domain.policy import Policy
from router.scheduler.queue.retry_gate import RETRY_SECONDS
from tests.scheduler.play import Play, sized

SMALL, PAIR = sized("small", 10), sized("pair", 40)
CONSTANTS = Policy().constants


def test_requests_wait_for_the_first_start_of_a_server_however_long_it_takes() -> None:
    one = Play(1)
    one.change_instance("gpu0", InstanceState.STARTING)
    ticket = one.arrive(SMALL)
    one.advance(2 * CONSTANTS.restart_grace_seconds)
    assert ticket in one.waiting
    one.change_instance("gpu0", InstanceState.READY)
    one.work_through()
    assert one.grant(ticket).instance == "gpu0"


@pytest.mark.parametrize("attached", [False, True])
def test_a_server_that_does_not_come_back_in_time_ends_the_wait(attached: bool) -> None:
    one = Play(1)
    one.specs = {name: replace(spec, attached=attached) for name, spec in one.specs.items()}
    one.begin()
    one.change_instance("gpu0", InstanceState.BACKOFF, "died")
    grace = CONSTANTS.attached_grace_seconds if attached else CONSTANTS.restart_grace_seconds
    ticket = one.arrive(SMALL)
    one.change_instance("gpu0", InstanceState.STARTING)
    one.change_instance("gpu0", InstanceState.BACKOFF, "died")
    one.advance(grace - 0.1)
    assert ticket in one.waiting
    one.advance(RETRY_SECONDS)
    refused = one.rejection(ticket)
    assert (refused.code, bool(refused.retry_after_seconds)) == ("no_instance", True)
    assert "gpu0 is backoff (died)" in refused.message
    assert one.rejection(one.arrive(SMALL)).code == "no_instance"
    one.change_instance("gpu0", InstanceState.READY)
    later = one.arrive(SMALL)
    one.work_through()
    assert one.grant(later).instance == "gpu0"


def test_a_model_that_only_a_server_that_is_down_could_hold_is_not_called_too_large() -> None:
    two = Play(2).begin()
    two.change_instance("spread", InstanceState.FATAL, "failed 5 times in a row")
    two.advance(10.0)
    refused = two.rejection(two.arrive(PAIR))
    assert refused.code == "no_instance"
    assert "spread is fatal (failed 5 times in a row)" in refused.message
