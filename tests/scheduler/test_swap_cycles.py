"""A large model and small ones that are asked for in turn stay loaded side by side where that costs less than swaps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy
from router.domain.residency import Residency
from router.domain.snapshot import Demand, Snapshot
from router.scheduler.placement.cost import fewer_slots_price, swap_price
from router.scheduler.placement.placement import MustWait, Placed, PlacementRequest, place
from router.scheduler.placement.search import seek
from tests.scheduler.builders import MIB, gpu, gpu_id, instance, key, model, residency, snapshot, ticket, view

LARGE, EMBEDDER = model("large", 40_000, context_length=131_072), model("embedder", 2_000)
UNSPLIT = model("unsplit", 21_000)
"""One GPU of 23,000 MiB holds it with one slot, not with two."""
VIEWS = (view("gpu0", 0), view("gpu1", 1), view("spread", 0, 1))
POLICY = Policy(vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=2))
SELDOM, OFTEN = Demand(2.0, 1000.0, 10.0), Demand(400.0, 1000.0, 10.0)
REQUEST = PlacementRequest(LARGE, may_use_fewer_slots=True)


def by_slots(of: ModelFacts, spec: InstanceSpec, context: int, facts: Snapshot) -> tuple[int, ...]:
    """The weights in equal parts, and 1,500 MiB a slot on each GPU: two slots need 23,000 MiB of 24,000."""
    del context, facts
    return tuple(of.weights_bytes // len(spec.gpus) + spec.num_parallel * 1500 * MIB for _ in spec.gpus)


def by_context(of: ModelFacts, spec: InstanceSpec, context: int, facts: Snapshot) -> tuple[int, ...]:
    """The weights, and a MiB for four tokens."""
    del facts
    return tuple(of.weights_bytes // len(spec.gpus) + context * MIB // 4 for _ in spec.gpus)


def _facts(
    policy: Policy = POLICY, *, large: Demand = SELDOM, embedder: Demand | None = SELDOM, in_flight: int = 0
) -> Snapshot:
    there = [residency("gpu1", EMBEDDER, 2_000, in_flight=in_flight, slots=1)]
    facts = snapshot([gpu(0, 24_000), gpu(1, 22_000)], VIEWS, there, policy=policy)
    return replace(facts, demand={LARGE.blob: large} | ({EMBEDDER.blob: embedder} if embedder else {}))


def _placed(facts: Snapshot, request: PlacementRequest = REQUEST) -> Placed:
    decision = place(facts, by_slots, request)
    assert isinstance(decision, Placed), decision
    return decision


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_large_model_gets_one_slot_less_where_an_embedder_would_come_back(in_flight: int) -> None:
    placed = _placed(_facts(in_flight=in_flight))
    assert (placed.instance, placed.evict) == ("gpu0+gpu1", ())
    assert placed.start is not None
    assert placed.start.num_parallel == 1
    assert placed.reason.endswith("; with fewer slots (1), so that embedder need not leave")


def test_an_embedder_that_nobody_asks_for_leaves() -> None:
    assert _placed(_facts(embedder=None)).evict == (key("gpu1", EMBEDDER),)


def test_a_large_model_that_needs_its_slots_keeps_them() -> None:
    assert _placed(_facts(large=OFTEN)).evict == (key("gpu1", EMBEDDER),)


@pytest.mark.parametrize("change", [{"may_use_fewer_slots": False}, {}])
def test_slots_are_not_reduced_unasked_or_against_the_configuration(change: dict[str, bool]) -> None:
    policy = POLICY if change else replace(POLICY, pins={"large": Pin(num_parallel=2)})
    assert _placed(_facts(policy), replace(REQUEST, **change)).evict == (key("gpu1", EMBEDDER),)


def test_an_embedder_that_fits_on_another_gpu_need_not_stay() -> None:
    other, views = model("other", 23_000), (*VIEWS, view("gpu2", 2))
    there = [residency("gpu1", EMBEDDER, 2_000, slots=1), residency("gpu2", other, 23_000, in_flight=1)]
    facts = snapshot([gpu(0, 24_000), gpu(1, 22_000), gpu(2, 1_000)], views, there, policy=POLICY)
    facts = replace(facts, demand=dict.fromkeys((LARGE.blob, EMBEDDER.blob), SELDOM))
    assert _placed(facts).evict == (key("gpu1", EMBEDDER),)
    kept = replace(facts, policy=replace(POLICY, exclusive_gpus={gpu_id(2): frozenset({"other"})}))
    assert _placed(kept).evict == ()


def test_a_context_step_is_left_out_where_that_ends_swaps() -> None:
    asked = ticket(1, model("long", 18_000, context_length=131_072), options=(("num_ctx", 10_000),), is_flexible=True)
    asked = replace(asked, context_length=10_000, arrived_at=1000.0)
    there = [residency("gpu0", EMBEDDER, 2_000, slots=1)]
    facts = snapshot([gpu(0, 22_000)], (view("gpu0", 0),), there, policy=POLICY)
    found = seek(facts, by_context, [asked])
    assert isinstance(found, Placed)
    assert (found.options, found.evict) == ((("num_ctx", 16_384),), (key("gpu0", EMBEDDER),))
    facts = replace(facts, demand=dict.fromkeys((asked.model.blob, EMBEDDER.blob), SELDOM))
    found = seek(facts, by_context, [asked])
    assert isinstance(found, Placed)
    assert (found.options, found.evict) == ((("num_ctx", 10_000),), ())
    assert found.reason.endswith("; with less context, so that embedder need not leave")


def test_a_wait_for_a_price_says_whose_it_is() -> None:
    decision = place(_facts(large=OFTEN), by_slots, replace(REQUEST, price_max=0.0))
    assert isinstance(decision, MustWait)
    assert decision.too_dear == (key("gpu1", EMBEDDER),)


def test_swaps_cost_both_reloads_as_often_as_the_rarer_model_is_asked_for() -> None:
    facts = replace(_facts(), demand={LARGE.blob: Demand(3.0, 1000.0), EMBEDDER.blob: SELDOM})
    (embedder,) = facts.residencies.values()
    reloads = 1.6 + (40_000 + 2_000) * MIB / 3e9
    assert swap_price(facts, LARGE, [embedder]) == pytest.approx(2.0 * 0.6931 * reloads, rel=1e-3)
    assert swap_price(facts, EMBEDDER, [embedder]) == 0.0
    second: Residency = replace(embedder, instance=instance("gpu0", 0).name)
    twice = replace(facts, residencies={**facts.residencies, (second.instance, second.blob): second})
    assert swap_price(twice, LARGE, [embedder]) == 0.0


def test_fewer_slots_cost_what_clients_wait_longer_and_those_who_wait_now() -> None:
    facts = _facts()
    assert fewer_slots_price(facts, LARGE, 2, 2) == 0.0
    alone = fewer_slots_price(facts, LARGE, 2, 1)
    assert 0.0 < alone < 2.0
    waiting = replace(facts, wanted={LARGE.blob: 2})
    assert fewer_slots_price(waiting, LARGE, 2, 1) == pytest.approx(alone + 10.0)
    assert fewer_slots_price(_facts(large=OFTEN), LARGE, 2, 1) == float("inf")


def test_a_model_that_one_gpu_holds_with_fewer_slots_is_not_split() -> None:
    placed = _placed(snapshot([gpu(0, 23_000), gpu(1, 22_000)], VIEWS, policy=POLICY), replace(REQUEST, model=UNSPLIT))
    assert [gpu for gpu, _ in placed.per_gpu_bytes] == [gpu_id(0)]
    assert placed.start is not None
    assert placed.start.num_parallel == 1
    assert placed.reason.endswith("; with fewer slots (1), so that one GPU holds it")


def test_with_configured_slots_the_model_is_split() -> None:
    policy = replace(POLICY, pins={"unsplit": Pin(num_parallel=2)})
    facts = snapshot([gpu(0, 23_000), gpu(1, 22_000)], VIEWS, policy=policy)
    assert len(_placed(facts, replace(REQUEST, model=UNSPLIT)).per_gpu_bytes) == 2
