"""Which models are evicted: enough, no more than necessary, and no busy ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.gpu import GpuUuid
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import bytes_by_gpu
from router.scheduler.placement.eviction import choose_evictions, evictable
from router.scheduler.placement.placement import Placed, PlacementRequest, place
from tests.scheduler.builders import MIB, by_weight, gpu, gpu_id, key, model, residency, snapshot, view

A, B, C, D = (model(name) for name in "abcd")
VIEWS = (view("gpu0", 0), view("gpu1", 1), view("spread", 0, 1))
GPU_MODELS = (gpu(0, 0), gpu(1, 0))


def _facts(*found: Residency) -> Snapshot:
    return snapshot(GPU_MODELS, VIEWS, found)


def _missing(*mib: int) -> dict[GpuUuid, int]:
    return {gpu_id(number): size * MIB for number, size in enumerate(mib)}


def test_only_idle_models_on_those_gpus_are_evictable_least_recently_used_first() -> None:
    facts = _facts(
        residency("gpu0", A, 1, used_at=9.0),
        residency("gpu0", B, 1, used_at=2.0, in_flight=1),
        residency("gpu0", C, 1, state=ResidencyState.LOADING),
        residency("gpu1", A, 1, used_at=1.0),
        residency("spread", D, 1, 1, used_at=5.0),
        residency("spread", A, 1, 1, state=ResidencyState.UNLOADING),
    )
    assert [(r.instance, r.blob) for r in evictable(facts, [gpu_id(0)])] == [key("spread", D), key("gpu0", A)]
    asked = [(r.instance, r.blob) for r in evictable(facts, [gpu_id(0)], busy=True)]
    assert asked == [key("spread", D), key("gpu0", A), key("gpu0", B)]


def test_nothing_is_evicted_if_nothing_is_missing() -> None:
    facts = _facts(residency("gpu0", A, 1000))
    assert choose_evictions(facts, _missing(0), evictable(facts, [gpu_id(0)])) == ()
    assert choose_evictions(facts, _missing(-5), []) == ()


def test_the_model_that_is_enough_alone_is_evicted_and_the_smaller_older_one_stays() -> None:
    facts = _facts(residency("gpu0", A, 100, used_at=1.0), residency("gpu0", B, 1000, used_at=2.0))
    assert choose_evictions(facts, _missing(900), evictable(facts, [gpu_id(0)])) == (key("gpu0", B),)
    assert choose_evictions(facts, _missing(1100), evictable(facts, [gpu_id(0)])) == (key("gpu0", A), key("gpu0", B))
    assert choose_evictions(facts, _missing(1101), evictable(facts, [gpu_id(0)])) is None


def test_evicting_a_spread_model_frees_all_its_gpus() -> None:
    facts = _facts(residency("spread", A, 500, 500), residency("gpu1", B, 300, used_at=9.0))
    both = [gpu_id(0), gpu_id(1)]
    assert choose_evictions(facts, _missing(400, 400), evictable(facts, both)) == (key("spread", A),)
    assert choose_evictions(facts, _missing(400, 700), evictable(facts, both)) == (key("spread", A), key("gpu1", B))


PLACES = st.sampled_from((("gpu0", 1), ("gpu1", 1), ("spread", 2)))


@st.composite
def residencies(draw: st.DrawFn) -> list[Residency]:
    found: dict[ResidencyKey, Residency] = {}
    for of in draw(st.lists(st.sampled_from((A, B, C, D)), max_size=6)):
        where, gpus = draw(PLACES)
        sizes = [draw(st.integers(0, 5)) for _ in range(gpus)]
        state = draw(st.sampled_from((ResidencyState.READY,) * 3 + tuple(ResidencyState)))
        one = residency(
            where, of, *sizes, state=state, in_flight=draw(st.integers(0, 1)), used_at=draw(st.floats(0, 9))
        )
        found[(one.instance, one.blob)] = one
    return list(found.values())


def _freed(facts: Snapshot, keys: tuple[ResidencyKey, ...]) -> dict[GpuUuid, int]:
    freed: dict[GpuUuid, int] = {gpu_id(0): 0, gpu_id(1): 0}
    for found in keys:
        for uuid, size in bytes_by_gpu(facts, facts.residencies[found]):
            freed[uuid] += size
    return freed


@given(residencies(), st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_evictions_are_enough_and_none_is_unnecessary(
    found: list[Residency], first: int, second: int, busy: bool
) -> None:
    facts, missing = _facts(*found), _missing(first, second)
    candidates = evictable(facts, missing, busy=busy)
    assert all(r.state is ResidencyState.READY and (busy or not r.in_flight) for r in candidates)
    chosen = choose_evictions(facts, missing, candidates)
    if chosen is None:
        everybody = _freed(facts, tuple((r.instance, r.blob) for r in candidates))
        assert any(everybody[gpu] < size for gpu, size in missing.items())
        return
    freed = _freed(facts, chosen)
    assert all(freed[gpu] >= size for gpu, size in missing.items())
    for one in chosen:
        without = _freed(facts, tuple(other for other in chosen if other != one))
        assert any(without[gpu] < size for gpu, size in missing.items())


@pytest.mark.parametrize(("used_mib", "is_placed"), [(19_700, True), (18_000, False)])
def test_small_unaccounted_memory_is_freed_with_our_models(used_mib: int, is_placed: bool) -> None:
    """Else a model that the GPU can hold once all others have left would wait for ever: nothing is booked that leaves
    as much. What is far from the books is another program's."""
    old, large = model("old", used_mib), model("large", 23_900)
    facts = snapshot([gpu(0, 4000)], [view("gpu0", 0)], [residency("gpu0", old, used_mib)])
    decision = place(facts, by_weight, PlacementRequest(large))
    assert isinstance(decision, Placed) == is_placed
    if isinstance(decision, Placed):
        assert decision.evict == (key("gpu0", old),)
