"""What a model takes: formulas beside the server's source, what must always hold, and what servers choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.footprint import Footprint
from router.domain.model import ModelFacts
from router.engines.ollama.architectures import Backend
from router.engines.ollama.compute_buffer import GraphShape, compute_buffer_bytes, vision_graph_bytes
from router.engines.ollama.kv_cache import draft_context_bytes, layer_cache_bytes, layer_state_bytes
from router.engines.ollama.memory_estimate import (
    CUDA_CONTEXT_BYTES,
    LayerSplit,
    LoadParameters,
    batch_tokens,
    effective_kv_cache_type,
    even_split,
    fill_first_split,
    footprint,
    layer_weights_bytes,
    output_on_gpus_bytes,
    uses_flash_attention,
    weights_on_gpus_bytes,
)
from tests.scheduler.builders import GB, LLAMA_70B, MIB, model

OLD, RECENT = (0, 24, 0), (0, 34, 0)
CPP, OWN = Backend.LLAMA_CPP, Backend.OLLAMA_ENGINE


def estimate(facts: ModelFacts, gpus: int, **changes: Any) -> Footprint:
    """Of a load at 8,192 tokens and one slot, evenly over GPUs."""
    return footprint(facts, even_split(facts.layers, gpus), replace(LoadParameters(8192), **changes))


def caches(
    facts: ModelFacts,
    *,
    context: int = 8192,
    slots: int = 1,
    kind: str = "f16",
    backend: Backend = CPP,
    version: tuple[int, int, int] = OLD,
) -> tuple[int, ...]:
    return layer_cache_bytes(facts, context, slots, kind, 512, backend, version)


def graph(
    facts: ModelFacts,
    *,
    context: int = 8192,
    flash: bool = True,
    backend: Backend = CPP,
    version: tuple[int, int, int] = OLD,
    gpus: int = 1,
) -> int:
    return compute_buffer_bytes(facts, GraphShape(context, 1, flash, 512, backend, version, gpus))


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
    estimated = estimate(LLAMA_70B, len(measured), flash_attention=flash_attention)
    assert [size / GB for size in estimated.per_gpu_bytes] == [pytest.approx(size, rel=0.05) for size in measured]
    assert estimated.total_bytes / GB == pytest.approx(sum(measured), rel=0.05)


def test_a_70b_without_its_tensor_table_is_never_called_smaller() -> None:
    blind = replace(LLAMA_70B, input_bytes=None, output_bytes=None)
    for gpus in (1, 2, 4):
        seen, unseen = (estimate(facts, gpus) for facts in (LLAMA_70B, blind))
        assert unseen.total_bytes > seen.total_bytes
        assert unseen.total_bytes / seen.total_bytes < 1.05


def test_the_kv_cache_of_a_70b_is_what_its_heads_and_layers_make() -> None:
    # 80 layers x 8 KV heads x (128 + 128) x 2 bytes = 327,680 bytes a token
    assert sum(caches(LLAMA_70B)) == 8192 * 327_680
    assert sum(caches(LLAMA_70B, slots=2, kind="q8_0")) == 2 * 8192 * 327_680 * 34 // 64
    assert sum(caches(LLAMA_70B, kind="q4_0")) == 8192 * 327_680 * 18 // 64


def test_a_layer_without_attention_keeps_nothing_and_one_without_a_count_the_most() -> None:
    hybrid = model("hybrid", layers=4, head_count=16, head_count_kv=(0, 4))
    token = 256 * 2
    assert caches(hybrid, context=256) == (0, 4 * token * 256, 16 * token * 256, 16 * token * 256)


def test_sliding_layers_keep_the_window_and_a_batch_of_each_slot() -> None:
    gemma = model("gemma", architecture="gemma3", layers=6, head_count_kv=(8,) * 6, sliding_window=1024)
    token = 8 * 256 * 2
    assert caches(gemma, slots=2) == (*(token * 1536 * 2,) * 5, token * 8192 * 2)
    assert caches(gemma, context=1024) == (token * 1024,) * 6
    assert caches(gemma, slots=2, backend=OWN) == (*(token * 2560,) * 5, token * 8192 * 2)


def test_windows_of_gemma2_are_kept_whole_before_0_30() -> None:
    gemma = model("gemma", architecture="gemma2", layers=2, head_count_kv=(8, 8), sliding_window=1024)
    assert len(set(caches(gemma))) == 1
    recent = caches(gemma, version=RECENT)
    assert recent[0] < recent[1]


def test_the_files_own_pattern_of_sliding_layers_comes_before_the_tables() -> None:
    pattern = (True, False, False)
    gemma = model("g", architecture="gemma4", layers=3, head_count_kv=(8,) * 3, sliding_window=512,
                  sliding_layers=pattern)  # fmt: skip
    sizes = caches(gemma, context=32_768)
    assert [size < max(sizes) for size in sizes] == list(pattern)


def test_layers_that_share_a_cache_have_none_and_sliding_heads_may_be_shorter() -> None:
    gemma = model("g", architecture="gemma4", layers=6, head_count_kv=(2,) * 6, sliding_window=512, key_length=512,
                  value_length=512, key_length_swa=256, value_length_swa=256, shared_kv_layers=3)  # fmt: skip
    token = 2 * 512 * 2
    assert caches(gemma, context=32_768) == (token * 1024,) * 3 + (0,) * 3


def test_hybrids_keep_a_state_for_each_sequence_in_layers_without_attention() -> None:
    hybrid = model("q", architecture="qwen35", layers=4, head_count_kv=(4,) * 4, full_attention_interval=4,
                   recurrent_state_elements=1000)  # fmt: skip
    assert caches(hybrid, slots=2)[:3] == (8000,) * 3
    assert layer_state_bytes(hybrid, 2) == (8000, 8000, 8000, 0)


def test_a_draft_head_gets_a_second_context_from_0_31() -> None:
    drafted = model("d", head_count_kv=(4,) * 32, nextn_layers=1)
    assert draft_context_bytes(drafted, 8192, 1, (0, 30, 0)) == 0
    assert draft_context_bytes(drafted, 8192, 1, RECENT) == 8192 * 4 * 256 * 2 + 130 * MIB


def test_an_encoder_keeps_no_cache_and_makes_no_logits() -> None:
    bert = model("bert", architecture="bert", is_embedding=True, vocabulary_size=1_000_000)
    assert sum(caches(bert, context=512)) == 0
    for version in (OLD, RECENT):
        assert graph(bert, context=512, version=version) < 4 * 512 * 1_000_000


def test_flash_attention_spares_the_scores_of_all_heads() -> None:
    with_it, without = (graph(LLAMA_70B, flash=flash) for flash in (True, False))
    assert with_it < without == 4 * 512 * (1 + 4 * 8192 + 8192 * 65)


def test_from_0_31_logits_are_reserved_for_slots_and_not_for_a_batch() -> None:
    large = model("l", vocabulary_size=1_000_000)
    assert graph(large, flash=True) >= 4 * 512 * 1_000_000 > graph(large, flash=True, version=RECENT)


def test_several_gpus_keep_copies_of_the_inputs() -> None:
    one, two = (graph(LLAMA_70B, flash=False, gpus=gpus) for gpus in (1, 2))
    assert two - one == 3 * 4 * 512 * (8192 + 8192)
    one, two = (graph(LLAMA_70B, flash=True, version=RECENT, gpus=gpus) for gpus in (1, 2))
    assert two - one == 3 * 2 * 512 * 8192
    assert graph(LLAMA_70B, backend=OWN, gpus=2) == graph(LLAMA_70B, backend=OWN)


def test_an_image_encoder_is_counted_where_the_server_puts_it() -> None:
    seeing = model("s", architecture="gemma3", has_vision=True, projector_bytes=800 * MIB, output_bytes=900 * MIB)
    own, clip = (GraphShape(8192, 1, True, 512, backend, version) for backend, version in ((OWN, OLD), (CPP, RECENT)))
    assert vision_graph_bytes(seeing, own) > vision_graph_bytes(seeing, clip) > 0
    first, last = estimate(seeing, 2, version="0.34.0").gpus
    assert first.projector_bytes == 800 * MIB
    assert last.projector_bytes == 0
    assert estimate(seeing, 2, version="0.24.0").projector_bytes == 0


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
        ({"is_embedding": True}, True, "0.33.0", True),
        ({"is_embedding": True}, True, "0.24.0", False),
        ({"architecture": "gemma4", "value_length": 128}, None, "0.20.3", False),
        ({"architecture": "gemma4", "value_length": 128}, None, "0.20.4", True),
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
    assert batch_tokens(model("m"), context, slots, version) == batch


@pytest.mark.parametrize(
    ("free_gib", "flash", "batch"),
    [([80], None, 2048), ([28], None, 1024), ([16], None, 512), ([8], False, 256), ([24], False, 512)],
)
def test_the_batch_steps_down_with_free_memory_from_0_30(free_gib: list[int], flash: bool | None, batch: int) -> None:
    large = model("m", weights_bytes=12 * 1024 * MIB, layers=32, head_count=32, head_count_kv=(8,) * 32)
    free = [gib * 1024 * MIB for gib in free_gib]
    assert batch_tokens(large, 32_768, 2, "0.34.0", flash, free) == batch


def test_embedding_models_take_the_context_as_batch_from_0_30() -> None:
    embedder = model("e", is_embedding=True)
    assert [batch_tokens(embedder, context, 1, "0.34.0") for context in (512, 8192)] == [512, 2048]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 0}, "context_length: 0 must be at least 1"),
        ({"slots": 0}, "slots: 0 must be at least 1"),
        ({"batch": -1}, "batch: -1 must be at least 1"),
        ({"kv_cache_type": "q9"}, "kv_cache_type: 'q9' is not a ggml type"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        footprint(LLAMA_70B, even_split(80, 1), replace(LoadParameters(8192), **changes))
    with pytest.raises(ValueError, match="must not be negative"):
        even_split(80, -1)


def test_a_70b_over_two_gpus_is_cut_after_its_fortieth_or_forty_first_layer() -> None:
    assert even_split(80, 2) == LayerSplit((41, 39), 1)
    assert even_split(80, 1) == LayerSplit((80,), 0)
    assert even_split(2, 4) == LayerSplit((1, 1, 0, 0), 2)
    assert even_split(80, 0).layers == ()


def test_unequal_gpus_are_filled_in_their_order_and_the_output_follows_the_last_layer() -> None:
    whole = estimate(LLAMA_70B, 1).total_bytes
    split = fill_first_split(LLAMA_70B, [24 * GB, 24 * GB], LoadParameters(8192))
    assert split is not None
    assert split.layers[0] > split.layers[1] > 0
    assert split.output_gpu == 1
    assert fill_first_split(LLAMA_70B, [whole, 24 * GB], LoadParameters(8192)) == LayerSplit((80, 0), 0)
    assert fill_first_split(LLAMA_70B, [whole - 1, 24 * GB], LoadParameters(8192)) == LayerSplit((80, 0), 1)
    assert fill_first_split(LLAMA_70B, [24 * GB], LoadParameters(8192)) is None
    assert fill_first_split(LLAMA_70B, [], LoadParameters(8192)) is None


def test_without_gpus_the_parts_say_what_host_memory_a_load_takes() -> None:
    on_cpu = estimate(LLAMA_70B, 0)
    assert on_cpu.per_gpu_bytes == ()
    assert on_cpu.cuda_context_bytes == 0
    assert on_cpu.weights_bytes == LLAMA_70B.weights_bytes
    assert on_cpu.kv_cache_bytes == sum(caches(LLAMA_70B))


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
GPU_COUNTS = st.integers(1, 8)


@st.composite
def loads(draw: st.DrawFn) -> LoadParameters:
    return LoadParameters(
        draw(CONTEXTS),
        draw(SLOTS),
        draw(st.sampled_from(("f16", "q8_0", "q4_0", ""))),
        draw(st.none() | st.booleans()),
        draw(st.sampled_from((256, 512, 2048))),
        draw(st.sampled_from((None, "0.11.4", "0.24.0", "0.30.0", "0.34.0"))),
    )


def _over(facts: ModelFacts, gpus: int, load: LoadParameters) -> Footprint:
    return footprint(facts, even_split(facts.layers, gpus), load)


@given(facts(), GPU_COUNTS, loads(), CONTEXTS, SLOTS)
def test_more_context_or_more_slots_never_take_less(
    of: ModelFacts, gpus: int, load: LoadParameters, context: int, slots: int
) -> None:
    few = replace(load, context_length=min(context, load.context_length), slots=min(slots, load.slots))
    many = replace(load, context_length=max(context, load.context_length), slots=max(slots, load.slots))
    small, large = _over(of, gpus, few), _over(of, gpus, many)
    assert all(a <= b for a, b in zip(small.per_gpu_bytes, large.per_gpu_bytes, strict=True))
    assert small.kv_cache_bytes <= large.kv_cache_bytes
    assert small.compute_buffer_bytes <= large.compute_buffer_bytes


@given(facts(), GPU_COUNTS, loads())
def test_spreading_a_model_never_makes_it_smaller_in_sum(of: ModelFacts, gpus: int, load: LoadParameters) -> None:
    whole, spread = _over(of, 1, load), _over(of, gpus, load)
    assert len(spread.per_gpu_bytes) == gpus
    assert spread.total_bytes >= whole.total_bytes
    assert spread.weights_bytes == whole.weights_bytes
    assert spread.kv_cache_bytes == whole.kv_cache_bytes
    assert spread.weights_bytes + spread.projector_bytes == weights_on_gpus_bytes(of)


@given(facts(), GPU_COUNTS, loads())
def test_the_parts_make_the_whole(of: ModelFacts, gpus: int, load: LoadParameters) -> None:
    found = _over(of, gpus, load)
    parts = (found.weights_bytes, found.kv_cache_bytes, found.recurrent_state_bytes, found.compute_buffer_bytes,
             found.projector_bytes, found.cuda_context_bytes)  # fmt: skip
    assert found.total_bytes == sum(parts)
    assert [gpu.total_bytes for gpu in found.gpus] == list(found.per_gpu_bytes)
    used = [size for size in found.per_gpu_bytes if size]
    assert found.cuda_context_bytes == len(used) * CUDA_CONTEXT_BYTES
    assert sum(layer_weights_bytes(of)) + output_on_gpus_bytes(of) == weights_on_gpus_bytes(of) <= of.weights_bytes


@given(facts(), GPU_COUNTS, loads())
def test_a_coarser_cache_is_never_larger(of: ModelFacts, gpus: int, load: LoadParameters) -> None:
    kinds = ("q4_0", "q8_0", "f16")
    sizes = [_over(of, gpus, replace(load, kv_cache_type=kind, flash_attention=True)) for kind in kinds]
    assert [size.total_bytes for size in sizes] == sorted(size.total_bytes for size in sizes)
    if uses_flash_attention(of, True, load.version) and sizes[2].kv_cache_bytes:
        assert sizes[0].kv_cache_bytes < sizes[1].kv_cache_bytes < sizes[2].kv_cache_bytes


@given(st.integers(0, 500), GPU_COUNTS)
def test_an_even_split_gives_out_every_layer_in_equal_parts(layers: int, gpus: int) -> None:
    split = even_split(layers, gpus)
    assert sum(split.layers) == layers
    units = [count + (gpu == split.output_gpu) for gpu, count in enumerate(split.layers)]
    assert max(units) - min(units) <= 1
    assert not any(split.layers[split.output_gpu + 1 :])


@given(facts(), st.lists(st.integers(0, 10**12), max_size=4), loads())
def test_a_gpu_that_is_filled_is_given_no_more_than_it_has(
    of: ModelFacts, free: Sequence[int], load: LoadParameters
) -> None:
    split = fill_first_split(of, free, load)
    if split is None:
        assert len(free) != 1 or free[0] < _over(of, 1, load).total_bytes
        return
    assert sum(split.layers) == of.layers
    found = footprint(of, split, load)
    assert all(size <= room for size, room in zip(found.per_gpu_bytes, free, strict=True))


def test_per_layer_embeddings_are_on_the_gpu_up_to_0_24_and_in_host_memory_from_0_30() -> None:
    """llama-server b10434 with all of a small gemma4 offloaded: CPU_Mapped 2.64 MiB = both embedding tables."""
    gemma = model("g", architecture="gemma4", input_bytes=0, output_bytes=900 * MIB, per_layer_input_bytes=600 * MIB)
    plain = replace(gemma, weights_bytes=gemma.weights_bytes - 600 * MIB, output_bytes=300 * MIB,
                    per_layer_input_bytes=0)  # fmt: skip
    assert estimate(gemma, 2, version="0.24.0").weights_bytes == gemma.weights_bytes
    assert estimate(gemma, 2, version="0.34.0") == estimate(plain, 2, version="0.34.0")
    assert estimate(gemma, 2, version="0.34.0").weights_bytes == plain.weights_bytes
