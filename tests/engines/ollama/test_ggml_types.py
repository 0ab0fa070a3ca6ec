"""Sizes of ggml types, compared with ggml's own `gguf` package."""

from __future__ import annotations

import gguf
import pytest

from router.engines.ollama.ggml_types import GGML_BLOCKS, cache_bytes, tensor_bytes


def test_types_have_the_sizes_of_the_gguf_package() -> None:
    theirs = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    common = GGML_BLOCKS.keys() & theirs.keys()
    assert {name: GGML_BLOCKS[name] for name in common} == {name: theirs[name] for name in common}
    assert len(common) >= 28


def test_every_type_of_a_common_quantisation_is_known() -> None:
    named = {kind.name for kind in gguf.GGML_QUANT_SIZES}
    assert {name for name in named if name.startswith(("F", "Q", "IQ"))} - GGML_BLOCKS.keys() == set()


def test_the_output_layer_of_a_70b_has_its_real_size() -> None:
    assert tensor_bytes("Q6_K", (8192, 128256)) == 861_880_320


@pytest.mark.parametrize(("kind", "shape"), [("F32", (64,)), ("F16", (64, 771)), ("f16", (64, 3, 257))])
def test_whole_numbers_take_their_width_times_their_count(kind: str, shape: tuple[int, ...]) -> None:
    count = 1
    for dimension in shape:
        count *= dimension
    assert tensor_bytes(kind, shape) == count * {"F32": 4, "F16": 2}[kind.upper()]


def test_rows_are_padded_to_whole_blocks() -> None:
    assert tensor_bytes("Q8_0", (33, 10)) == 2 * 34 * 10


def test_an_unknown_type_has_no_size() -> None:
    assert tensor_bytes("unknown", (64, 64)) is None


@pytest.mark.parametrize(("kind", "expected"), [("f16", 2048), ("", 2048), ("q8_0", 1088), ("q4_0", 576)])
def test_cache_elements_have_the_size_of_their_blocks(kind: str, expected: int) -> None:
    assert cache_bytes(kind, 1024) == expected


def test_an_unknown_cache_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_type: 'q9_9'.*use f16, q8_0 or q4_0"):
        cache_bytes("q9_9", 32)
