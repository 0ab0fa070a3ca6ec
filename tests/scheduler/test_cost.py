"""Prices of evictions and values of loads, in seconds of waiting."""

from __future__ import annotations

import math
from dataclasses import replace

from router.domain.model import BlobDigest
from router.domain.policy import Policy, SchedulerConstants
from router.domain.snapshot import Demand, Snapshot
from router.scheduler.placement.cost import eviction_price, reload_seconds, swap_ease, worth_of_load
from router.scheduler.state import FleetState
from tests.scheduler.builders import OLLAMA, model, residency, snapshot, ticket, view

M = model("m", 2000)
COPY = residency("gpu0", M, 2000)
BUSY = replace(COPY, in_flight=1)
_BUSY_ONES = {(BUSY.instance, BUSY.blob): BUSY}
POLICY = Policy(vram_margin_bytes=0)


def _facts(rate: float = 0.1, *replicas: object, **changes: object) -> Snapshot:
    weight = rate * POLICY.constants.demand_half_life_seconds / math.log(2.0)
    facts = snapshot([], [view("gpu0", 0), view("gpu1", 1)], replicas or [COPY])  # type: ignore[arg-type]
    return replace(facts, policy=POLICY, demand={M.blob: Demand(weight, facts.now)}, **changes)


def test_an_eviction_costs_a_late_token_for_each_request_expected_while_the_model_is_away() -> None:
    away = POLICY.constants.away_seconds + reload_seconds(_facts(), M)
    assert math.isclose(eviction_price(_facts(), COPY), 0.1 * away * POLICY.ttft_target_seconds)


def test_a_model_without_requests_costs_nothing_and_one_with_waiting_requests_more() -> None:
    assert eviction_price(_facts(0.0), COPY) == 0.0
    waited_for = eviction_price(_facts(wanted={M.blob: 2}), COPY)
    assert math.isclose(waited_for - eviction_price(_facts(), COPY), 2 * POLICY.ttft_target_seconds)


def test_evicting_a_spare_replica_is_nearly_free() -> None:
    alone, spare = eviction_price(_facts(), COPY), eviction_price(_facts(0.1, COPY, residency("gpu1", M, 2000)), COPY)
    assert math.isclose(spare, alone / 10)


def test_demand_fades() -> None:
    later = replace(_facts(), now=1000.0 + POLICY.constants.demand_half_life_seconds)
    assert math.isclose(eviction_price(later, COPY), eviction_price(_facts(), COPY) / 2)


def test_a_load_is_worth_one_target_for_each_ticket_that_it_can_serve_in_time() -> None:
    facts = _facts(0.1, BUSY, loaded_bytes_per_second=1e12)
    fresh = [ticket(number, M, arrived_at=facts.now) for number in range(3)]
    assert worth_of_load(facts, M, fresh) == 3 * POLICY.ttft_target_seconds
    late = [ticket(1, M, arrived_at=facts.now - 50.0)]
    assert math.isclose(worth_of_load(facts, M, late), 50.0 * POLICY.constants.wait_weight)


def test_while_loads_are_few_late_tickets_are_worth_a_load_at_once() -> None:
    calm, pressed = _facts(), _facts(0.1, BUSY, loaded_bytes_per_second=1e12)
    late = [ticket(1, M, arrived_at=calm.now - 20.0)]
    assert (swap_ease(calm), swap_ease(pressed)) == (POLICY.constants.swap_ease_max, 1.0)
    assert worth_of_load(calm, M, late) > worth_of_load(pressed, M, late)


def test_recent_loads_do_not_delay_a_late_ticket_on_an_idle_machine() -> None:
    pressed = _facts(loaded_bytes_per_second=1e12)
    late = [ticket(1, M, arrived_at=pressed.now)]
    slow = replace(pressed, load_rate_bytes_per_second=1e6, wanted={M.blob: 1})
    assert worth_of_load(slow, M, late) == POLICY.constants.late_share_idle * POLICY.ttft_target_seconds
    for busier in (replace(slow, wanted={M.blob: 1, BlobDigest("other"): 1}), replace(slow, residencies=_BUSY_ONES)):
        assert worth_of_load(busier, M, late) == 0.0


def test_large_loads_weigh_more_in_the_load_rate_than_small_ones() -> None:
    policy = Policy(constants=SchedulerConstants(load_fixed_seconds=0.8, load_bytes_per_second=3e9))
    fleet = FleetState(policy, OLLAMA)
    fleet.loaded(300_000_000, 0.9)  # an embedder: mostly the start of its runner
    first = fleet.load_rate_bytes_per_second
    assert first is not None
    assert 2e9 < first < 3e9
    for _ in range(10):
        fleet.loaded(42_500_000_000, 9.5)
        fleet.loaded(300_000_000, 0.9)
    rate = fleet.load_rate_bytes_per_second
    assert rate is not None
    assert math.isclose(rate, 42.5e9 / 9.1, rel_tol=0.1)
