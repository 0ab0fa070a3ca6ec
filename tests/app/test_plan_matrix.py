"""The hardware matrix of the multi-GPU guide against the estimator: which model fits on which machine.

Where the two differ, docs/footprints.md says who is right; the tests here hold what the sums say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from router.app.model_sources import find_source
from router.app.plan import planned_gpus
from router.domain.model import ModelFacts
from router.engines.ollama.plan import ModelPlan, PlanOptions, plan_models
from tests.engines.ollama.measured_loads import measured_loads

VERSIONS = ("0.24.0", "0.33.0")
TWO_OF_24_GB = ("2x3090", "2x4090", "4090+3090")
LARGER = ("2xa6000", "4x3090", "2xa100-80", "4xa6000ada", "h100-80")

_K = 1024
_NO_STORE = Path("/nonexistent")


def _catalogued(name: str) -> ModelFacts:
    return find_source(name, _NO_STORE).facts


LLAMA_70B = _catalogued("llama3.3:70b")
_Q8_TABLE = LLAMA_70B.vocabulary_size * LLAMA_70B.embedding_length * 34 // 32
LLAMA_70B_Q8 = replace(
    LLAMA_70B,
    name="llama3.3:70b-q8_0",
    weights_bytes=74_975_000_000,
    input_bytes=_Q8_TABLE,
    output_bytes=_Q8_TABLE + 4 * LLAMA_70B.embedding_length,
)
MIXTRAL_Q4_K_M = replace(_catalogued("mixtral:8x22b"), name="mixtral:8x22b-q4_K_M", weights_bytes=85_600_000_000)
GPT_OSS_120B = next(load.facts for load in measured_loads() if load.facts.name == "gpt-oss:120b")


def _plan(facts: ModelFacts, gpus: str, context_length: int, version: str, **changes: object) -> ModelPlan:
    options = PlanOptions(default_context_length=context_length, version=version)
    (plan,) = plan_models([facts], planned_gpus(gpus), replace(options, **changes))
    return plan


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("gpus", "context_length"),
    [
        *((gpus, 8 * _K) for gpus in TWO_OF_24_GB),
        ("2xa6000", 32 * _K),
        ("4x3090", 32 * _K),
        ("2xa100-80", 128 * _K),
        ("4xa6000ada", 128 * _K),
        ("h100-80", 32 * _K),
    ],
)
def test_a_70b_of_four_bits_fits_where_the_guide_says(gpus: str, context_length: int, version: str) -> None:
    assert _plan(LLAMA_70B, gpus, context_length, version).fits


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gpus", TWO_OF_24_GB)
def test_sixteen_thousand_tokens_are_too_much_for_a_70b_on_48_gb(gpus: str, version: str) -> None:
    plan = _plan(LLAMA_70B, gpus, 16 * _K, version)
    assert not plan.fits
    assert 12 * _K < plan.context_length_max < 16 * _K


@pytest.mark.parametrize("gpus", TWO_OF_24_GB)
def test_a_cache_of_eight_bits_makes_room_for_sixteen_thousand_tokens(gpus: str) -> None:
    plan = _plan(LLAMA_70B, gpus, 16 * _K, "0.24.0", kv_cache_type="q8_0", flash_attention=True)
    assert plan.fits
    assert plan.kv_cache_type == "q8_0"


def test_a_quantised_cache_is_not_counted_without_flash_attention_switched_on() -> None:
    plan = _plan(LLAMA_70B, "2x3090", 16 * _K, "0.24.0", kv_cache_type="q8_0")
    assert not plan.fits
    assert plan.kv_cache_type == "f16"


@pytest.mark.parametrize("version", VERSIONS)
def test_one_gpu_of_48_gb_holds_a_70b_a_little_beyond_sixteen_thousand_tokens(version: str) -> None:
    plan = _plan(LLAMA_70B, "a6000", 16 * _K, version)
    assert plan.fits
    assert 16 * _K < plan.context_length_max < 24 * _K


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gpus", TWO_OF_24_GB)
def test_a_70b_of_eight_bits_fits_on_no_machine_of_48_gb(gpus: str, version: str) -> None:
    plan = _plan(LLAMA_70B_Q8, gpus, 8 * _K, version)
    assert not plan.fits
    assert plan.context_length_max == 0
    assert all(part.missing_bytes > 0 for part in plan.gpus)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gpus", LARGER)
def test_a_70b_of_eight_bits_fits_on_all_larger_machines(gpus: str, version: str) -> None:
    assert _plan(LLAMA_70B_Q8, gpus, 8 * _K, version).fits


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gpus", TWO_OF_24_GB)
def test_gpt_oss_120b_fits_on_no_machine_of_48_gb(gpus: str, version: str) -> None:
    assert not _plan(GPT_OSS_120B, gpus, 8 * _K, version).fits


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gpus", LARGER)
def test_gpt_oss_120b_fits_on_all_larger_machines(gpus: str, version: str) -> None:
    assert _plan(GPT_OSS_120B, gpus, 8 * _K, version).fits


@pytest.mark.parametrize("version", VERSIONS)
def test_gpt_oss_120b_is_not_tight_on_two_gpus_of_48_gb(version: str) -> None:
    """The guide means a 120B of more bits: at 4.25 bits three quarters of the memory hold the whole context too."""
    plan = _plan(GPT_OSS_120B, "2xa6000", 128 * _K, version)
    assert plan.fits
    assert sum(part.footprint.total_bytes for part in plan.gpus) < 0.75 * sum(
        p.gpu.memory_free_bytes for p in plan.gpus
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("gpus", "fits"), [("2x4090", False), ("2xa6000", True), ("4x3090", True)])
def test_mixtral_8x22b_fits_where_the_guide_says(gpus: str, fits: bool, version: str) -> None:
    assert _plan(MIXTRAL_Q4_K_M, gpus, 8 * _K, version).fits is fits


def test_the_smallest_set_of_gpus_is_taken() -> None:
    assert [len(_plan(LLAMA_70B, gpus, 8 * _K, "0.24.0").gpus) for gpus in ("2xa6000", "4x3090", "h100-80")] == [
        1,
        2,
        1,
    ]


def test_among_sets_of_as_many_gpus_the_one_with_the_least_free_memory_is_taken() -> None:
    plan = _plan(_catalogued("llama3.1:8b"), "a6000+3090+4090", 8 * _K, "0.24.0")
    assert [part.gpu.index for part in plan.gpus] == [2]


def test_from_0_30_layers_are_split_by_memory_and_before_evenly() -> None:
    plan = _plan(LLAMA_70B_Q8, "2x3090+a6000", 8 * _K, "0.33.0")
    assert plan.fits
    assert plan.gpus[2].layers > plan.gpus[0].layers
    assert not _plan(LLAMA_70B_Q8, "2x3090+a6000", 8 * _K, "0.24.0").fits


def test_what_one_model_takes_is_not_there_for_the_next() -> None:
    small = _catalogued("qwen2.5:14b")
    options = PlanOptions(default_context_length=8 * _K, version="0.24.0")
    alone = plan_models([small], planned_gpus("3090"), options)
    twice = plan_models([small, small], planned_gpus("3090"), options)
    thrice = plan_models([small, small, small], planned_gpus("3090"), options)
    assert [plan.fits for plan in (*alone, *twice, *thrice)] == [True, True, True, True, True, False]
    first, second = twice
    taken = first.gpus[0].gpu.memory_free_bytes - second.gpus[0].gpu.memory_free_bytes
    assert taken >= first.gpus[0].footprint.total_bytes
    assert first.slots_max < alone[0].slots_max


def test_what_is_said_to_fit_at_most_fits_and_a_step_more_does_not() -> None:
    plan = _plan(LLAMA_70B, "2x3090", 8 * _K, "0.24.0")
    assert _plan(LLAMA_70B, "2x3090", plan.context_length_max, "0.24.0").fits
    assert not _plan(LLAMA_70B, "2x3090", plan.context_length_max + 256, "0.24.0").fits
    assert _plan(LLAMA_70B, "2x3090", 8 * _K, "0.24.0", slots=plan.slots_max).fits
    assert not _plan(LLAMA_70B, "2x3090", 8 * _K, "0.24.0", slots=plan.slots_max + 1).fits


def test_an_unknown_architecture_gets_a_wider_margin() -> None:
    unknown = replace(LLAMA_70B, architecture="newest")
    known, other = (_plan(facts, "h100", 8 * _K, "0.24.0") for facts in (LLAMA_70B, unknown))
    assert (known.is_known_architecture, other.is_known_architecture) == (True, False)
    assert other.gpus[0].margin_bytes - known.gpus[0].margin_bytes == pytest.approx(
        0.08 * known.gpus[0].footprint.total_bytes, rel=0.01
    )


def test_a_blackwell_gpu_keeps_more_for_its_cuda_context() -> None:
    sizes = [_plan(_catalogued("llama3.1:8b"), gpus, 8 * _K, "0.33.0").gpus[0].footprint for gpus in ("4090", "5090")]
    assert sizes[1].cuda_context_bytes > sizes[0].cuda_context_bytes


def test_an_embedding_model_has_one_slot() -> None:
    plan = _plan(_catalogued("nomic-embed-text"), "3090", 8 * _K, "0.33.0", slots=4)
    assert (plan.load.slots, plan.slots_max, plan.load.context_length) == (1, 1, 2048)
