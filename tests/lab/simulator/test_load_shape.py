"""Load shapes by server version: examples from the servers' sources."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.lab.scenarios import model_facts
from router.lab.simulator.load_shape import RequestedShape, shape_for
from router.lab.simulator.loaded_model import ServerConfig, shape_of

OLDEST, OLD, NEW = (0, 11, 4), (0, 24, 0), (0, 33, 0)
GEMMA2, LLAMA = model_facts("gemma2:27b"), model_facts("llama3.1:8b")
REQUESTED = RequestedShape(OLD, 8192, 2, "q8_0", flash_attention=True)


@pytest.mark.parametrize(("version", "cache", "flash"), [(OLD, "f16", False), (NEW, "q8_0", True)])
def test_gemma2_has_flash_attention_and_a_quantised_cache_from_0_30_only(
    version: tuple[int, ...], cache: str, flash: bool
) -> None:
    shape = shape_for(GEMMA2, replace(REQUESTED, version=version))
    assert (shape.kv_cache_type, shape.flash_attention) == (cache, flash)
    assert shape == replace(shape_of(GEMMA2, ServerConfig(version=version)))


@pytest.mark.parametrize(
    ("version", "requested", "flash"),
    [(OLDEST, None, False), (OLDEST, True, True), (OLD, None, True), (OLD, False, False), (NEW, None, True),
     (NEW, False, False)],
)  # fmt: skip
def test_default_flash_attention_depends_on_the_version(
    version: tuple[int, ...], requested: bool | None, flash: bool
) -> None:
    assert shape_for(LLAMA, replace(REQUESTED, version=version, flash_attention=requested)).flash_attention == flash


@pytest.mark.parametrize(
    ("version", "architecture", "cache"), [(OLD, "llama", "f16"), (OLD, "qwen3", "q8_0"), (NEW, "llama", "q8_0")]
)
def test_the_llama_cpp_engine_of_0_24_ignores_a_quantised_cache_without_requested_flash_attention(
    version: tuple[int, ...], architecture: str, cache: str
) -> None:
    model = replace(LLAMA, architecture=architecture)
    assert shape_for(model, replace(REQUESTED, version=version, flash_attention=None)).kv_cache_type == cache


def test_embedding_models_and_some_architectures_have_one_slot() -> None:
    models = (LLAMA, replace(LLAMA, is_embedding=True), replace(LLAMA, architecture="qwen3vl"))
    assert [shape_for(one, REQUESTED).slots for one in models] == [2, 1, 1]


def test_from_0_30_the_batch_depends_on_the_context_unless_it_is_requested() -> None:
    requested = [REQUESTED, replace(REQUESTED, version=NEW), replace(REQUESTED, version=NEW, batch_tokens=64)]
    assert [shape_for(LLAMA, one).batch_tokens for one in requested] == [512, 1024, 64]
