"""Footprints against figures measured on real GPUs, against what is known of parts, and by what must always hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.model import ModelFacts
from router.engines.ollama.memory_estimate import (
    CUDA_CONTEXT_BYTES,
    LayerSplit,
    batch_tokens,
    compute_buffer_bytes,
    effective_kv_cache_type,
    even_split,
    fill_first_split,
    footprint,
    footprint_of_split,
    kv_cache_bytes,
    layer_kv_cache_bytes,
    layer_weights_bytes,
    output_on_gpus_bytes,
    uses_flash_attention,
    weights_on_gpus_bytes,
)
from tests.scheduler.builders import GB, LLAMA_70B, MIB, model

MEASURED: dict[str, tuple[float, ...]] = {
    "one A6000": (46.1,),
    "two 3090": (23.8, 22.4),
    "two 4090": (23.6, 22.6),
    "a 4090 and a 3090": (23.5, 22.7),
}
"""GB on each GPU for Llama 3.3 70B Q4_K_M at 8,192 tokens and one slot, as nvidia-smi showed them."""


@pytest.mark.parametrize("gpus", MEASURED)
@pytest.mark.parametrize("flash_attention", [None, True])
def test_a_70b_takes_what_was_measured_within_five_percent(gpus: str, flash_attention: bool | None) -> None:
    measured = MEASURED[gpus]
    estimated = footprint(LLAMA_70B, len(measured), 8192, 1, "f16", flash_attention)
    assert [size / GB for size in estimated.per_gpu_bytes] == [pytest.approx(size, rel=0.05) for size in measured]
    assert estimated.total_bytes / GB == pytest.approx(sum(measured), rel=0.05)


def test_a_70b_without_its_tensor_table_is_never_called_smaller() -> None:
    blind = replace(LLAMA_70B, input_bytes=None, output_bytes=None)
    for gpus in (1, 2, 4):
        seen, unseen = (footprint(facts, gpus, 8192, 1, "f16", None) for facts in (LLAMA_70B, blind))
        assert unseen.total_bytes > seen.total_bytes
        assert unseen.total_bytes / seen.total_bytes < 1.05


def test_the_kv_cache_of_a_70b_is_what_its_heads_and_layers_make() -> None:
    # 80 layers x 8 KV heads x (128 + 128) x 2 bytes = 327,680 bytes a token
    assert kv_cache_bytes(LLAMA_70B, 8192, 1, "f16") == 8192 * 327_680
    assert kv_cache_bytes(LLAMA_70B, 8192, 2, "q8_0") == 2 * 8192 * 327_680 * 34 // 64
    assert kv_cache_bytes(LLAMA_70B, 8192, 1, "q4_0") == 8192 * 327_680 * 18 // 64


def test_a_layer_without_attention_keeps_nothing_and_one_that_is_not_told_the_most() -> None:
    hybrid = model("hybrid", layers=4, head_count=16, head_count_kv=(0, 4))
    token = 256 * 2
    assert layer_kv_cache_bytes(hybrid, 100, 1, "f16") == (0, 4 * token * 100, 16 * token * 100, 16 * token * 100)


def test_layers_with_a_sliding_window_keep_the_window_and_a_batch() -> None:
    gemma = model("gemma", architecture="gemma3", layers=6, head_count_kv=(8,) * 6, sliding_window=1024)
    token = 8 * 256 * 2
    assert layer_kv_cache_bytes(gemma, 8192, 2, "f16") == (*(token * 1536 * 2,) * 5, token * 8192 * 2)
    assert layer_kv_cache_bytes(gemma, 1000, 1, "f16") == (token * 1000,) * 6


def test_an_encoder_keeps_no_cache_and_makes_no_logits() -> None:
    bert = model("bert", architecture="bert", is_embedding=True, vocabulary_size=1_000_000)
    assert kv_cache_bytes(bert, 512, 1, "f16") == 0
    assert compute_buffer_bytes(bert, 512, 1, flash_attention=True) < 4 * 512 * 1_000_000


def test_flash_attention_spares_the_scores_of_all_heads() -> None:
    with_it, without = (compute_buffer_bytes(LLAMA_70B, 8192, 1, flash) for flash in (True, False))
    assert with_it < without
    # GraphSize, llama: 4 B (1 + 4 E + C (1 + H))
    assert without == 4 * 512 * (1 + 4 * 8192 + 8192 * 65)


def test_each_architecture_with_a_formula_of_its_own_is_counted_by_it() -> None:
    gptoss = model("gpt-oss", architecture="gptoss", vocabulary_size=1, embedding_length=1)
    assert compute_buffer_bytes(gptoss, 8192, 2, flash_attention=True) == (4 * 2 + 16 + 110) * MIB
    qwen = model("qwen", architecture="qwen2", vocabulary_size=1)
    assert compute_buffer_bytes(qwen, 8192, 1, flash_attention=False) == 4 * 512 * (1 + 2 * 4096 + 8192 * 33)
    gemma = model("gemma", architecture="gemma3", vocabulary_size=1)
    graph = 4 * 512 * (2 + 8192 + 8192 * 32 + 2 * 4096 + 2 * 128 * 32)
    assert compute_buffer_bytes(gemma, 8192, 1, flash_attention=False) == graph
    assert compute_buffer_bytes(replace(gemma, architecture="gemma3n"), 8192, 1, flash_attention=False) == 4 * graph


@pytest.mark.parametrize(
    ("changes", "asked", "used"),
    [
        ({}, None, True),
        ({}, True, True),
        ({}, False, False),
        ({"architecture": "gemma2"}, True, False),
        ({"architecture": "mllama"}, None, False),
        ({"architecture": "mllama"}, True, True),
        ({"is_embedding": True}, True, False),
        ({"value_length": 64}, True, False),
        ({"value_length": 64, "architecture": "qwen3next"}, None, True),
    ],
)
def test_flash_attention_is_used_where_the_server_would(
    changes: dict[str, Any], asked: bool | None, used: bool
) -> None:
    assert uses_flash_attention(model("m", **changes), asked) is used
    assert uses_flash_attention(model("m", **changes), asked, "0.24.0") is used


@pytest.mark.parametrize(
    ("changes", "asked", "version", "used"),
    [
        ({}, None, "0.11.4", False),
        ({}, True, "0.11.4", True),
        ({"architecture": "gemma2"}, True, "0.30.0", True),
        ({"architecture": "gemma2"}, None, "0.33.0-rc2", True),
        ({"architecture": "gemma2"}, False, "0.33.0", False),
        ({"value_length": 64}, True, "0.33.0", True),
        ({"is_embedding": True}, True, "0.33.0", False),
        ({"architecture": "gemma2"}, True, "of my own", False),
    ],
)
def test_whether_the_model_decides_on_flash_attention_differs_by_version(
    changes: dict[str, Any], asked: bool | None, version: str, used: bool
) -> None:
    facts = model("m", **changes)
    assert uses_flash_attention(facts, asked, version) is used
    assert effective_kv_cache_type(facts, "q8_0", asked, version) == ("q8_0" if used and asked else "f16")


@pytest.mark.parametrize(
    ("asked", "architecture", "used"),
    [(True, "llama", "q8_0"), (None, "llama", "f16"), (False, "llama", "f16"), (True, "gemma2", "f16")],
)
def test_a_quantised_cache_needs_flash_attention_in_so_many_words(
    asked: bool | None, architecture: str, used: str
) -> None:
    assert effective_kv_cache_type(model("m", architecture=architecture), "q8_0", asked) == used


@pytest.mark.parametrize(
    ("version", "context", "slots", "batch"),
    [
        (None, 131_072, 4, 512),
        ("0.11.4", 131_072, 4, 512),
        ("0.24.0", 131_072, 4, 512),
        ("0.30.0", 2048, 2, 512),
        ("0.33.0-rc2", 8192, 2, 1024),
        ("0.33.0", 16_384, 4, 2048),
        ("1.0.0", 8192, 1, 1024),
        ("nonsense", 8192, 1, 512),
    ],
)
def test_the_batch_is_what_each_version_takes(version: str | None, context: int, slots: int, batch: int) -> None:
    assert batch_tokens(version, context, slots) == batch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_length": 0}, "context_length: 0 must be at least 1"),
        ({"slots": 0}, "slots: 0 must be at least 1"),
        ({"batch": -1}, "batch: -1 must be at least 1"),
        ({"kv_cache_type": "q9"}, "kv_cache_type: 'q9' is not a ggml type"),
        ({"gpus": -1}, "must not be negative"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(changes: dict[str, Any], words: str) -> None:
    ordinary: dict[str, Any] = {"gpus": 1, "context_length": 8192, "slots": 1, "kv_cache_type": "f16"}
    with pytest.raises(ValueError, match=words):
        footprint(LLAMA_70B, **{**ordinary, **changes}, flash_attention=None)


def test_a_70b_over_two_gpus_is_cut_after_its_fortieth_or_forty_first_layer() -> None:
    assert even_split(80, 2) == LayerSplit((41, 39), 1)
    assert even_split(80, 1) == LayerSplit((80,), 0)
    assert even_split(2, 4) == LayerSplit((1, 1, 0, 0), 2)
    assert even_split(80, 0).layers == ()


def test_unequal_gpus_are_filled_in_their_order_and_the_output_follows_the_last_layer() -> None:
    whole = footprint(LLAMA_70B, 1, 8192, 1, "f16", None).total_bytes
    split = fill_first_split(LLAMA_70B, [24 * GB, 24 * GB], 8192, 1, "f16", None)
    assert split is not None
    assert split.layers[0] > split.layers[1] > 0
    assert split.output_gpu == 1
    assert fill_first_split(LLAMA_70B, [whole, 24 * GB], 8192, 1, "f16", None) == LayerSplit((80, 0), 0)
    assert fill_first_split(LLAMA_70B, [whole - 1, 24 * GB], 8192, 1, "f16", None) == LayerSplit((80, 0), 1)
    assert fill_first_split(LLAMA_70B, [24 * GB], 8192, 1, "f16", None) is None
    assert fill_first_split(LLAMA_70B, [], 8192, 1, "f16", None) is None


def test_without_gpus_the_parts_say_what_host_memory_a_load_takes() -> None:
    on_cpu = footprint(LLAMA_70B, 0, 8192, 1, "f16", None)
    assert on_cpu.per_gpu_bytes == ()
    assert on_cpu.cuda_context_bytes == 0
    assert on_cpu.weights_bytes == LLAMA_70B.weights_bytes
    assert on_cpu.kv_cache_bytes == kv_cache_bytes(LLAMA_70B, 8192, 1, "f16")


# --- what must always hold --------------------------------------------------------------------------------------


@st.composite
def facts(draw: st.DrawFn) -> ModelFacts:
    """Models of any shape whose heads are as wide as real ones."""
    layers = draw(st.integers(1, 100))
    heads = draw(st.integers(1, 128))
    weights = draw(st.integers(1, 10**12))
    ends = st.none() | st.integers(0, weights // 3)
    head = st.sampled_from((64, 96, 128, 192, 256))
    return model(
        "any",
        architecture=draw(st.sampled_from(("llama", "qwen2", "gemma2", "gemma3", "gemma3n", "gptoss", "bert", "new"))),
        weights_bytes=weights,
        layers=layers,
        embedding_length=heads * 64,
        head_count=heads,
        head_count_kv=tuple(draw(st.lists(st.integers(0, heads), min_size=layers, max_size=layers))),
        key_length=draw(head),
        value_length=draw(head),
        vocabulary_size=draw(st.integers(0, 300_000)),
        sliding_window=draw(st.none() | st.sampled_from((128, 1024, 4096))),
        input_bytes=draw(ends),
        output_bytes=draw(ends),
        is_embedding=draw(st.booleans()),
    )


CONTEXTS = st.integers(1, 131_072)
SLOTS = st.integers(1, 8)
GPU_MODELS = st.integers(1, 8)
TYPES = st.sampled_from(("f16", "q8_0", "q4_0", ""))
FLASH = st.none() | st.booleans()


@given(facts(), GPU_MODELS, CONTEXTS, CONTEXTS, SLOTS, SLOTS, TYPES, FLASH)
def test_more_context_or_more_slots_never_take_less(
    of: ModelFacts, gpus: int, one: int, other: int, few: int, many: int, kind: str, flash: bool | None
) -> None:
    small = footprint(of, gpus, min(one, other), min(few, many), kind, flash)
    large = footprint(of, gpus, max(one, other), max(few, many), kind, flash)
    assert all(a <= b for a, b in zip(small.per_gpu_bytes, large.per_gpu_bytes, strict=True))
    assert small.kv_cache_bytes <= large.kv_cache_bytes
    assert small.compute_buffer_bytes <= large.compute_buffer_bytes


@given(facts(), GPU_MODELS, CONTEXTS, SLOTS, TYPES, FLASH)
def test_spreading_a_model_never_makes_it_smaller_in_sum_nor_larger_on_a_gpu(
    of: ModelFacts, gpus: int, context: int, slots: int, kind: str, flash: bool | None
) -> None:
    whole = footprint(of, 1, context, slots, kind, flash)
    spread = footprint(of, gpus, context, slots, kind, flash)
    assert len(spread.per_gpu_bytes) == gpus
    assert spread.total_bytes >= whole.total_bytes
    assert max(spread.per_gpu_bytes) <= whole.total_bytes
    assert spread.weights_bytes == whole.weights_bytes == weights_on_gpus_bytes(of)
    assert spread.kv_cache_bytes == whole.kv_cache_bytes


@given(facts(), GPU_MODELS, CONTEXTS, SLOTS, TYPES, FLASH)
def test_the_parts_make_the_whole(
    of: ModelFacts, gpus: int, context: int, slots: int, kind: str, flash: bool | None
) -> None:
    found = footprint(of, gpus, context, slots, kind, flash)
    parts = found.weights_bytes + found.kv_cache_bytes + found.compute_buffer_bytes + found.cuda_context_bytes
    assert found.total_bytes == parts
    used = [size for size in found.per_gpu_bytes if size]
    assert found.cuda_context_bytes == len(used) * CUDA_CONTEXT_BYTES
    assert all(size >= CUDA_CONTEXT_BYTES for size in used)
    assert sum(layer_weights_bytes(of)) + output_on_gpus_bytes(of) == weights_on_gpus_bytes(of) <= of.weights_bytes


@given(facts(), GPU_MODELS, CONTEXTS, SLOTS)
def test_a_coarser_cache_is_never_larger(of: ModelFacts, gpus: int, context: int, slots: int) -> None:
    sizes = [footprint(of, gpus, context, slots, kind, True).total_bytes for kind in ("q4_0", "q8_0", "f16")]
    assert sizes == sorted(sizes)
    if uses_flash_attention(of, True) and kv_cache_bytes(of, context, slots, "f16"):
        assert sizes[0] < sizes[1] < sizes[2]


@given(st.integers(0, 500), GPU_MODELS)
def test_an_even_split_gives_out_every_layer_in_equal_parts(layers: int, gpus: int) -> None:
    split = even_split(layers, gpus)
    assert sum(split.layers) == layers
    units = [count + (gpu == split.output_gpu) for gpu, count in enumerate(split.layers)]
    assert max(units) - min(units) <= 1
    assert not any(split.layers[split.output_gpu + 1 :])


@given(facts(), st.lists(st.integers(0, 10**12), max_size=4), CONTEXTS, SLOTS, TYPES, FLASH)
def test_a_gpu_that_is_filled_is_given_no_more_than_it_has(
    of: ModelFacts, free: list[int], context: int, slots: int, kind: str, flash: bool | None
) -> None:
    split = fill_first_split(of, free, context, slots, kind, flash)
    whole = footprint(of, 1, context, slots, kind, flash).total_bytes
    if split is None:
        assert not any(size >= whole for size in free)
        return
    assert sum(split.layers) == of.layers
    found = footprint_of_split(of, split, context, slots, kind, flash)
    assert all(size <= room for size, room in zip(found.per_gpu_bytes, free, strict=True))
