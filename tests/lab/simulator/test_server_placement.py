"""Where servers put models: what is known of v0.24 and v0.33, as cases and as rules that hold for all sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator.server_placement import (
    LoadRequest,
    VisibleGpu,
    default_context,
    graph_bytes,
    human_bytes,
    plan,
    predicted_bytes,
    sizes,
    with_fitting_batch,
)
from router.lab.simulator.world import WORLD, LoadShape

GIB = 1024**3
_NEW = (0, 33, 0)

LLAMA_70B = ModelFacts(
    name="llama3.3:70b", digest="d", blob=BlobDigest("sha256:70b"), weights_bytes=42_520_413_916, architecture="llama",
    layers=80, embedding_length=8192, head_count=64, head_count_kv=(8,) * 80, key_length=128, value_length=128,
    vocabulary_size=128_256, context_length=131_072, input_bytes=591_003_648, output_bytes=861_880_320,
)  # fmt: skip
LLAMA_8B = replace(
    LLAMA_70B, name="llama3.1:8b", weights_bytes=4_920_753_328, layers=32, embedding_length=4096,
    head_count=32, head_count_kv=(8,) * 32, input_bytes=295_501_824, output_bytes=430_940_160,
)  # fmt: skip


def _room(free_gib: float = 23.68, total_gib: float = 23.68, bandwidth: float = 936e9) -> VisibleGpu:
    return VisibleGpu(int(total_gib * GIB), int(free_gib * GIB), bandwidth)


def _ask(model: ModelFacts, context: int = 8192, slots: int = 1, cache: str = "f16", **fields: object) -> LoadRequest:
    return LoadRequest(model, LoadShape(context, slots, cache), **fields)  # type: ignore[arg-type]


def test_a_small_model_takes_one_gpu_and_the_one_with_most_room() -> None:
    assert plan(WORLD, _ask(LLAMA_8B), [_room(10), _room(20)]).layers == (0, 33)


def test_a_faster_gpu_is_taken_before_one_with_more_room() -> None:
    assert plan(WORLD, _ask(LLAMA_8B), [_room(20), _room(15, bandwidth=1008e9)]).layers == (0, 33)


def test_spread_takes_all_gpus_evenly() -> None:
    assert plan(WORLD, _ask(LLAMA_8B, spread=True), [_room(), _room()]).layers == (17, 16)


def test_the_wide_estimate_of_0_24_wants_three_gpus_for_a_70b_with_two_slots() -> None:
    ask = _ask(LLAMA_70B, slots=2)
    three = plan(WORLD, ask, [_room()] * 3)
    assert three.on_gpus == 81
    assert all(three.layers)
    assert plan(WORLD, ask, [_room()] * 4).layers.count(0) == 1


@pytest.mark.parametrize(("cache", "on_cpu"), [("f16", 0.09), ("q8_0", 0.02)])
def test_given_two_gpus_0_24_leaves_part_of_a_70b_on_the_cpu(cache: str, on_cpu: float) -> None:
    ask = _ask(LLAMA_70B, slots=2, cache=cache)
    chosen = plan(WORLD, ask, [_room()] * 2)
    assert 1 - chosen.on_gpus / 81 == pytest.approx(on_cpu, abs=0.035)
    whole, on_gpus = sizes(WORLD, ask, chosen.layers)
    assert whole > 0
    assert all(size <= 23.68 * GIB for size in on_gpus)


@pytest.mark.parametrize("version", [(0, 24, 0), _NEW])
def test_two_24_gb_gpus_are_planned_full_at_8k_and_over_full_at_16k(version: tuple[int, ...]) -> None:
    on_gpus = [plan(WORLD, _ask(LLAMA_70B, context, version=version), [_room()] * 2).on_gpus
                for context in (8192, 16_384)]  # fmt: skip
    assert on_gpus[0] == 81 > on_gpus[1]


def test_all_layers_asked_for_go_to_the_gpus_whatever_the_estimate() -> None:
    for version in ((0, 24, 0), _NEW):
        chosen = plan(WORLD, _ask(LLAMA_70B, slots=2, num_gpu=81, version=version), [_room()] * 2)
        assert (chosen.on_gpus, min(chosen.layers)) == (81, 40)


def test_0_33_shares_all_layers_as_it_is_told() -> None:
    ask = _ask(LLAMA_70B, version=_NEW, num_gpu=81, spread=True, tensor_split=(32.0, 16.0))
    assert plan(WORLD, ask, [_room(31), _room(15)]).layers == (54, 27)
    assert plan(WORLD, replace(ask, tensor_split=()), [_room(30), _room(15)]).layers == (54, 27)
    assert plan(WORLD, replace(ask, tensor_split=(1.0, 1.0)), [_room(31), _room(15)]).layers == (41, 40)


@pytest.mark.parametrize(
    ("told", "wanted", "layers"),
    [((2.0, 1.0), 81, (54, 27)), ((2.0, 1.0), 40, (27, 13)), ((1.0,), 81, (81, 0)), ((1.0,), 40, (40, 0)),
     ((0.0, 0.0, 1.0), 40, (26, 14)), ((), 40, (26, 14)), ((1.0, 1.0, 5.0), 40, (20, 20))],
)  # fmt: skip
def test_0_33_shares_as_many_layers_as_are_asked_for_in_the_shares_of_the_gpus_that_it_has(
    told: tuple[float, ...], wanted: int, layers: tuple[int, ...]
) -> None:
    ask = _ask(LLAMA_70B, version=_NEW, num_gpu=wanted, spread=True, tensor_split=told)
    assert plan(WORLD, ask, [_room(20), _room(11)]).layers == layers


def test_beside_other_models_the_ordinary_rule_evicts_first() -> None:
    for version in ((0, 24, 0), _NEW):
        chosen = plan(WORLD, _ask(LLAMA_70B, slots=2, has_others=True, version=version), [_room(23), _room(10)])
        assert chosen.must_evict


def test_0_33_takes_one_gpu_up_to_eighty_per_cent_of_its_room() -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192)) / GIB
    fits = plan(WORLD, _ask(LLAMA_70B, version=_NEW), [_room(needs / 0.79), _room(2)])
    tight = plan(WORLD, _ask(LLAMA_70B, version=_NEW), [_room(needs / 0.81), _room(needs / 0.9)])
    assert fits.layers == (81, 0)
    assert all(tight.layers)


def test_0_33_pins_a_model_to_the_asked_gpu() -> None:
    assert plan(WORLD, _ask(LLAMA_8B, version=_NEW, main_gpu=1), [_room(), _room(), _room()]).layers == (0, 33, 0)


def test_0_33_leaves_one_per_cent_of_a_70b_on_the_cpu_of_two_gpus() -> None:
    chosen = plan(WORLD, _ask(LLAMA_70B, slots=2, version=_NEW), [_room()] * 2)
    assert 1 - chosen.on_gpus / 81 == pytest.approx(0.01, abs=0.02)


def test_the_prediction_of_0_33_ignores_the_cache_type() -> None:
    assert predicted_bytes(LLAMA_8B, LoadShape(8192, 2, "q4_0")) == predicted_bytes(LLAMA_8B, LoadShape(8192, 2, "f16"))
    assert predicted_bytes(LLAMA_8B, LoadShape(8192, 2)) == LLAMA_8B.weights_bytes + 2 * 32 * 8 * 128 * 8192 * 2 * 2


def _batch(model: ModelFacts, rooms: list[VisibleGpu], batch: int = 1024, flash: bool = True, **fields: object) -> int:
    shape = LoadShape(8192, 2, "q8_0", flash, batch)
    return with_fitting_batch(LoadRequest(model, shape, **{"version": _NEW, **fields}), rooms).shape.batch_tokens  # type: ignore[arg-type]


def test_0_33_takes_the_batch_of_its_context_where_the_prediction_leaves_room_for_it() -> None:
    assert _batch(LLAMA_8B, [_room()] * 4) == 1024
    assert _batch(LLAMA_8B, [_room(200, 200)], batch=2048) == 2048


@pytest.mark.parametrize(("share", "batch"), [(0.74, 1024), (0.76, 512)])
def test_0_33_lowers_its_batch_above_three_quarters_of_the_free_memory(share: float, batch: int) -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB
    assert _batch(LLAMA_70B, [_room(needs / share / 2, 48)] * 2) == batch


def test_0_33_lowers_its_batch_where_what_it_takes_beside_the_prediction_is_over_eighty_per_cent() -> None:
    needs = predicted_bytes(LLAMA_8B, LoadShape(8192, 2)) / GIB
    free = needs / 0.74
    assert needs + 0.75 > 0.8 * free
    assert _batch(LLAMA_8B, [_room(free)]) == 512


def test_0_33_lowers_a_batch_of_2048_step_by_step() -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB
    assert [_batch(LLAMA_70B, [_room(needs / share, 200)], batch=2048) for share in (0.59, 0.61, 0.76)] == [
        2048, 1024, 512]  # fmt: skip


def test_0_33_without_flash_attention_takes_512_and_on_a_small_gpu_256() -> None:
    assert _batch(LLAMA_8B, [_room()], flash=False) == 512
    assert _batch(LLAMA_8B, [_room(7, 8)], flash=False) == 256


def test_a_batch_that_is_asked_for_and_one_of_0_24_are_never_lowered() -> None:
    assert _batch(LLAMA_70B, [_room(4)], is_batch_given=True) == 1024
    assert _batch(LLAMA_70B, [_room(4)], batch=512, version=(0, 24, 0)) == 512


def test_the_graph_of_a_70b_with_two_slots_is_about_two_gib() -> None:
    assert graph_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB == pytest.approx(2.1, abs=0.05)


def test_a_model_that_fits_no_memory_is_refused_with_the_bytes() -> None:
    chosen = plan(WORLD, _ask(LLAMA_70B, num_gpu=0, host_free_bytes=23 * GIB), [_room()])
    assert chosen.error is not None
    assert chosen.error.endswith("than is available (23.0 GiB)")
    assert chosen.on_gpus == 0


@pytest.mark.parametrize(
    ("total_gib", "version", "tokens"),
    [(0, (0, 24, 0), 4096), (22.9, (0, 24, 0), 4096), (23.7, (0, 24, 0), 32_768), (47.4, (0, 24, 0), 262_144),
     (47.4, (0, 11, 4), 4096), (47.4, _NEW, 262_144)],
)  # fmt: skip
def test_the_default_context_goes_by_all_memory_that_is_seen(
    total_gib: float, version: tuple[int, ...], tokens: int
) -> None:
    assert default_context(int(total_gib * GIB), version) == tokens


def test_an_overhead_lowers_the_default_context() -> None:
    assert default_context(24 * GIB, (0, 24, 0), 2 * GIB) == 4096


@pytest.mark.parametrize(("amount", "text"), [(76_772_000_000, "71.5 GiB"), (1536, "1.5 KiB"), (512, "512 B")])
def test_sizes_are_printed_as_go_prints_them(amount: int, text: str) -> None:
    assert human_bytes(amount) == text


# --- rules ------------------------------------------------------------------------------------------------

_ROOMS = st.lists(
    st.builds(lambda free, fast: _room(free, 24, fast), st.floats(0, 24), st.sampled_from([936e9, 1008e9])),
    max_size=4,
)
_ASKS = st.builds(
    LoadRequest,
    model=st.builds(
        lambda size, layers, kind: replace(LLAMA_70B, weights_bytes=size, layers=layers, architecture=kind,
                                           head_count_kv=(8,) * layers),
        st.integers(10**8, 10**11), st.integers(1, 100), st.sampled_from(["llama", "qwen2", "qwen3", "gemma3"])),
    shape=st.builds(LoadShape, st.integers(4, 65_536), st.integers(1, 4)),
    version=st.sampled_from([(0, 11, 4), (0, 24, 0), _NEW]),
    num_gpu=st.sampled_from([-1, 0, 1, 20, 999]),
    main_gpu=st.integers(0, 2),
    spread=st.booleans(),
    has_others=st.booleans(),
)  # fmt: skip


@given(_ASKS, _ROOMS)
def test_a_plan_never_has_more_units_than_the_model(ask: LoadRequest, rooms: list[VisibleGpu]) -> None:
    chosen = plan(WORLD, ask, rooms)
    assert len(chosen.layers) == len(rooms)
    assert all(units >= 0 for units in chosen.layers)
    assert chosen.on_gpus <= ask.model.layers + 1
    assert not (chosen.must_evict and chosen.on_gpus)
    assert not (chosen.must_evict and not ask.has_others)


@given(_ASKS, _ROOMS)
def test_without_a_wish_0_24_never_plans_more_than_it_believes_to_fit(
    ask: LoadRequest, rooms: list[VisibleGpu]
) -> None:
    chosen = plan(WORLD, replace(ask, num_gpu=-1, version=(0, 24, 0)), rooms)
    unit = ask.model.weights_bytes // (2 * (ask.model.layers + 1))  # half of a layer at the least
    assert all(units * unit <= room.free_bytes for units, room in zip(chosen.layers, rooms, strict=True))


@given(_ASKS, _ROOMS, st.sampled_from([512, 1024, 2048]))
def test_a_batch_is_never_raised_and_settled_only_once(ask: LoadRequest, rooms: list[VisibleGpu], batch: int) -> None:
    wanted = replace(ask, shape=replace(ask.shape, batch_tokens=batch))
    memoise = with_fitting_batch(wanted, rooms)
    assert memoise.shape.batch_tokens <= batch
    assert with_fitting_batch(memoise, rooms) == memoise


@given(_ASKS, _ROOMS)
def test_a_plan_is_the_same_every_time(ask: LoadRequest, rooms: list[VisibleGpu]) -> None:
    assert plan(WORLD, ask, rooms) == plan(WORLD, ask, rooms)


@given(_ASKS)
def test_the_whole_of_a_model_on_a_gpu_leaves_nothing_on_the_host(ask: LoadRequest) -> None:
    host, on_gpus = sizes(WORLD, ask, (ask.model.layers + 1,))
    assert (host, len(on_gpus)) == (0, 1)
    assert sizes(WORLD, ask, (0,))[1] == (0,)
