"""Model placement of v0.24 and v0.33 servers: examples from their sources, and properties for all sizes."""

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
from router.lab.simulator.true_footprint import LoadShape

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


def _gpu(free_gib: float = 23.68, total_gib: float = 23.68, bandwidth: float = 936e9) -> VisibleGpu:
    return VisibleGpu(int(total_gib * GIB), int(free_gib * GIB), bandwidth)


def _request(
    model: ModelFacts, context: int = 8192, slots: int = 1, cache: str = "f16", **fields: object
) -> LoadRequest:
    return LoadRequest(model, LoadShape(context, slots, cache), **fields)  # type: ignore[arg-type]


def test_a_small_model_takes_the_gpu_with_most_free_memory() -> None:
    assert plan(_request(LLAMA_8B), [_gpu(10), _gpu(20)]).layers == (0, 33)


def test_a_faster_gpu_is_preferred_to_one_with_more_free_memory() -> None:
    assert plan(_request(LLAMA_8B), [_gpu(20), _gpu(15, bandwidth=1008e9)]).layers == (0, 33)


def test_spread_takes_all_gpus_evenly() -> None:
    assert plan(_request(LLAMA_8B, spread=True), [_gpu(), _gpu()]).layers == (17, 16)


def test_0_24_estimates_three_gpus_for_a_70b_with_two_slots() -> None:
    request = _request(LLAMA_70B, slots=2)
    three = plan(request, [_gpu()] * 3)
    assert three.on_gpus == 81
    assert all(three.layers)
    assert plan(request, [_gpu()] * 4).layers.count(0) == 1


@pytest.mark.parametrize(("cache", "on_cpu"), [("f16", 0.09), ("q8_0", 0.02)])
def test_given_two_gpus_0_24_leaves_part_of_a_70b_on_the_cpu(cache: str, on_cpu: float) -> None:
    request = _request(LLAMA_70B, slots=2, cache=cache)
    placement = plan(request, [_gpu()] * 2)
    assert 1 - placement.on_gpus / 81 == pytest.approx(on_cpu, abs=0.035)
    whole, on_gpus = sizes(request, placement.layers)
    assert whole > 0
    assert all(size <= 23.68 * GIB for size in on_gpus)


@pytest.mark.parametrize("version", [(0, 24, 0), _NEW])
def test_two_24_gb_gpus_hold_a_70b_at_8k_and_not_at_16k(version: tuple[int, ...]) -> None:
    on_gpus = [plan(_request(LLAMA_70B, context, version=version), [_gpu()] * 2).on_gpus
                for context in (8192, 16_384)]  # fmt: skip
    assert on_gpus[0] == 81 > on_gpus[1]


def test_requested_layers_go_to_the_gpus_regardless_of_the_estimate() -> None:
    for version in ((0, 24, 0), _NEW):
        placement = plan(_request(LLAMA_70B, slots=2, num_gpu=81, version=version), [_gpu()] * 2)
        assert (placement.on_gpus, min(placement.layers)) == (81, 40)


def test_0_33_splits_all_layers_by_the_tensor_split() -> None:
    request = _request(LLAMA_70B, version=_NEW, num_gpu=81, spread=True, tensor_split=(32.0, 16.0))
    assert plan(request, [_gpu(31), _gpu(15)]).layers == (54, 27)
    assert plan(replace(request, tensor_split=()), [_gpu(30), _gpu(15)]).layers == (54, 27)
    assert plan(replace(request, tensor_split=(1.0, 1.0)), [_gpu(31), _gpu(15)]).layers == (41, 40)


@pytest.mark.parametrize(
    ("split", "layers_requested", "layers"),
    [((2.0, 1.0), 81, (54, 27)), ((2.0, 1.0), 40, (27, 13)), ((1.0,), 81, (81, 0)), ((1.0,), 40, (40, 0)),
     ((0.0, 0.0, 1.0), 40, (26, 14)), ((), 40, (26, 14)), ((1.0, 1.0, 5.0), 40, (20, 20))],
)  # fmt: skip
def test_0_33_splits_the_requested_layers_by_the_shares_of_its_gpus(
    split: tuple[float, ...], layers_requested: int, layers: tuple[int, ...]
) -> None:
    request = _request(LLAMA_70B, version=_NEW, num_gpu=layers_requested, spread=True, tensor_split=split)
    assert plan(request, [_gpu(20), _gpu(11)]).layers == layers


def test_with_other_models_loaded_the_default_rule_evicts_first() -> None:
    for version in ((0, 24, 0), _NEW):
        placement = plan(_request(LLAMA_70B, slots=2, has_others=True, version=version), [_gpu(23), _gpu(10)])
        assert placement.must_evict


def test_0_33_takes_one_gpu_up_to_eighty_per_cent_of_its_free_memory() -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192)) / GIB
    fits = plan(_request(LLAMA_70B, version=_NEW), [_gpu(needs / 0.79), _gpu(2)])
    tight = plan(_request(LLAMA_70B, version=_NEW), [_gpu(needs / 0.81), _gpu(needs / 0.9)])
    assert fits.layers == (81, 0)
    assert all(tight.layers)


def test_0_33_pins_a_model_to_main_gpu() -> None:
    assert plan(_request(LLAMA_8B, version=_NEW, main_gpu=1), [_gpu(), _gpu(), _gpu()]).layers == (0, 33, 0)


def test_0_33_leaves_one_per_cent_of_a_70b_on_the_cpu_of_two_gpus() -> None:
    placement = plan(_request(LLAMA_70B, slots=2, version=_NEW), [_gpu()] * 2)
    assert 1 - placement.on_gpus / 81 == pytest.approx(0.01, abs=0.02)


def test_the_prediction_of_0_33_ignores_the_cache_type() -> None:
    assert predicted_bytes(LLAMA_8B, LoadShape(8192, 2, "q4_0")) == predicted_bytes(LLAMA_8B, LoadShape(8192, 2, "f16"))
    assert predicted_bytes(LLAMA_8B, LoadShape(8192, 2)) == LLAMA_8B.weights_bytes + 2 * 32 * 8 * 128 * 8192 * 2 * 2


def _batch(model: ModelFacts, gpus: list[VisibleGpu], batch: int = 1024, flash: bool = True, **fields: object) -> int:
    shape = LoadShape(8192, 2, "q8_0", flash, batch)
    return with_fitting_batch(LoadRequest(model, shape, **{"version": _NEW, **fields}), gpus).shape.batch_tokens  # type: ignore[arg-type]


def test_0_33_uses_the_batch_of_its_context_if_the_prediction_leaves_room() -> None:
    assert _batch(LLAMA_8B, [_gpu()] * 4) == 1024
    assert _batch(LLAMA_8B, [_gpu(200, 200)], batch=2048) == 2048


@pytest.mark.parametrize(("share", "batch"), [(0.74, 1024), (0.76, 512)])
def test_0_33_lowers_its_batch_above_three_quarters_of_the_free_memory(share: float, batch: int) -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB
    assert _batch(LLAMA_70B, [_gpu(needs / share / 2, 48)] * 2) == batch


def test_0_33_lowers_its_batch_if_its_extra_memory_exceeds_eighty_per_cent() -> None:
    needs = predicted_bytes(LLAMA_8B, LoadShape(8192, 2)) / GIB
    free = needs / 0.74
    assert needs + 0.75 > 0.8 * free
    assert _batch(LLAMA_8B, [_gpu(free)]) == 512


def test_0_33_lowers_a_batch_of_2048_step_by_step() -> None:
    needs = predicted_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB
    assert [_batch(LLAMA_70B, [_gpu(needs / share, 200)], batch=2048) for share in (0.59, 0.61, 0.76)] == [
        2048, 1024, 512]  # fmt: skip


def test_0_33_without_flash_attention_takes_512_and_on_a_small_gpu_256() -> None:
    assert _batch(LLAMA_8B, [_gpu()], flash=False) == 512
    assert _batch(LLAMA_8B, [_gpu(7, 8)], flash=False) == 256


def test_a_requested_batch_and_a_batch_of_0_24_are_never_lowered() -> None:
    assert _batch(LLAMA_70B, [_gpu(4)], is_batch_given=True) == 1024
    assert _batch(LLAMA_70B, [_gpu(4)], batch=512, version=(0, 24, 0)) == 512


def test_the_graph_of_a_70b_with_two_slots_is_about_two_gib() -> None:
    assert graph_bytes(LLAMA_70B, LoadShape(8192, 2)) / GIB == pytest.approx(2.1, abs=0.05)


def test_a_model_larger_than_memory_is_refused_with_the_bytes() -> None:
    placement = plan(_request(LLAMA_70B, num_gpu=0, host_free_bytes=23 * GIB), [_gpu()])
    assert placement.error is not None
    assert placement.error.endswith("than is available (23.0 GiB)")
    assert placement.on_gpus == 0


@pytest.mark.parametrize(
    ("total_gib", "version", "tokens"),
    [(0, (0, 24, 0), 4096), (22.9, (0, 24, 0), 4096), (23.7, (0, 24, 0), 32_768), (47.4, (0, 24, 0), 262_144),
     (47.4, (0, 11, 4), 4096), (47.4, _NEW, 262_144)],
)  # fmt: skip
def test_the_default_context_depends_on_total_visible_memory(
    total_gib: float, version: tuple[int, ...], tokens: int
) -> None:
    assert default_context(int(total_gib * GIB), version) == tokens


def test_an_overhead_lowers_the_default_context() -> None:
    assert default_context(24 * GIB, (0, 24, 0), 2 * GIB) == 4096


@pytest.mark.parametrize(("amount", "text"), [(76_772_000_000, "71.5 GiB"), (1536, "1.5 KiB"), (512, "512 B")])
def test_sizes_are_printed_as_go_prints_them(amount: int, text: str) -> None:
    assert human_bytes(amount) == text


# --- rules ------------------------------------------------------------------------------------------------

_GPUS = st.lists(
    st.builds(lambda free, fast: _gpu(free, 24, fast), st.floats(0, 24), st.sampled_from([936e9, 1008e9])),
    max_size=4,
)
_REQUESTS = st.builds(
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


@given(_REQUESTS, _GPUS)
def test_a_plan_never_has_more_units_than_the_model(request: LoadRequest, gpus: list[VisibleGpu]) -> None:
    placement = plan(request, gpus)
    assert len(placement.layers) == len(gpus)
    assert all(units >= 0 for units in placement.layers)
    assert placement.on_gpus <= request.model.layers + 1
    assert not (placement.must_evict and placement.on_gpus)
    assert not (placement.must_evict and not request.has_others)


@given(_REQUESTS, _GPUS)
def test_without_a_wish_0_24_never_plans_more_than_it_believes_to_fit(
    request: LoadRequest, gpus: list[VisibleGpu]
) -> None:
    placement = plan(replace(request, num_gpu=-1, version=(0, 24, 0)), gpus)
    unit = request.model.weights_bytes // (2 * (request.model.layers + 1))  # at least half a layer
    assert all(units * unit <= gpu.free_bytes for units, gpu in zip(placement.layers, gpus, strict=True))


@given(_REQUESTS, _GPUS, st.sampled_from([512, 1024, 2048]))
def test_fitting_a_batch_never_raises_it_and_is_idempotent(
    request: LoadRequest, gpus: list[VisibleGpu], batch: int
) -> None:
    larger = replace(request, shape=replace(request.shape, batch_tokens=batch))
    fitted = with_fitting_batch(larger, gpus)
    assert fitted.shape.batch_tokens <= batch
    assert with_fitting_batch(fitted, gpus) == fitted


@given(_REQUESTS, _GPUS)
def test_a_plan_is_the_same_every_time(request: LoadRequest, gpus: list[VisibleGpu]) -> None:
    assert plan(request, gpus) == plan(request, gpus)


@given(_REQUESTS)
def test_a_model_fully_on_a_gpu_uses_no_host_memory(request: LoadRequest) -> None:
    host_bytes, on_gpus = sizes(request, (request.model.layers + 1,))
    assert (host_bytes, len(on_gpus)) == (0, 1)
    assert sizes(request, (0,))[1] == (0,)
