"""What servers do by themselves: as known of 0.24 and 0.33, and like the simulated servers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.engines.ollama.memory_estimate import predicted_bytes
from router.engines.ollama.offload_rules import explain_override, may_take_one_gpu, predict_offload
from router.lab.simulator.server_placement import LoadRequest, VisibleGpu, plan
from router.lab.simulator.true_footprint import LoadShape
from router.scheduler.reconcile.residency import send
from router.scheduler.state import FleetState
from tests.scheduler.builders import LLAMA_70B, OLLAMA, gpu, instance, key, model, reservation, residency, snapshot

GIB = 1024**3
GPU = int(23.68 * GIB)
LLAMA_8B = replace(
    LLAMA_70B, name="llama3.1:8b", weights_bytes=4_920_753_328, layers=32, embedding_length=4096,
    head_count=32, head_count_kv=(8,) * 32, input_bytes=295_501_824, output_bytes=430_940_160,
)  # fmt: skip
TUNED = replace(instance("spread", 0, 1), kv_cache_type="q8_0", flash_attention=True)
SPREAD = {"OLLAMA_SCHED_SPREAD": "1"}


@pytest.mark.parametrize(("cache", "on_cpu"), [("f16", 0.09), ("q8_0", 0.02)])
def test_0_24_leaves_part_of_a_70b_on_the_cpu_of_two_24_gb_gpus(cache: str, on_cpu: float) -> None:
    answer = predict_offload(LLAMA_70B, replace(TUNED, kv_cache_type=cache), "0.24.0", 8192, 2, [GPU, GPU])
    assert answer is not None
    assert 1 - answer.on_gpus / answer.layers == pytest.approx(on_cpu, abs=0.035)


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0-rc2"])
def test_a_model_that_fits_well_is_left_whole(version: str) -> None:
    assert predict_offload(LLAMA_8B, TUNED, version, 8192, 2, [GPU, GPU]) == (33, 33)


@pytest.mark.parametrize(
    ("of", "version", "free"),
    [
        (LLAMA_8B, None, [GPU]),
        (LLAMA_8B, "0.24.0", []),
        (replace(LLAMA_8B, layers=0, head_count_kv=()), "0.33.0", [GPU]),
        (replace(LLAMA_8B, architecture="gemma3"), "0.24.0", [GPU]),
    ],
)
def test_unknown_cases_have_no_prediction(of: ModelFacts, version: str | None, free: list[int]) -> None:
    assert predict_offload(of, TUNED, version, 8192, 2, free) is None


@given(
    st.sampled_from([LLAMA_8B, LLAMA_70B]),
    st.sampled_from(["0.24.0", "0.33.0"]),
    st.sampled_from([2048, 8192, 32_768]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["f16", "q8_0"]),
    st.lists(st.integers(4, 48), min_size=1, max_size=4),
)
def test_predictions_match_the_simulated_server_within_four_layers_per_gpu(
    of: ModelFacts, version: str, context: int, slots: int, cache: str, free_gib: list[int]
) -> None:
    spec = replace(instance("x", *range(len(free_gib))), kv_cache_type=cache, flash_attention=True)
    free = [gib * GIB for gib in free_gib]
    answer = predict_offload(of, spec, version, context, slots, free)
    number = tuple(int(part) for part in version.split("."))
    ask = LoadRequest(of, LoadShape(context, slots, cache), version=number)
    simulated = plan(ask, [VisibleGpu(gib, gib, 936e9) for gib in free])
    assert answer is not None
    assert answer.on_gpus == pytest.approx(simulated.on_gpus, abs=4 * len(free))


def test_a_load_that_the_server_would_spill_says_so_in_its_reason() -> None:
    fleet = FleetState(snapshot().policy, OLLAMA)
    view = InstanceView(TUNED, InstanceState.READY, "0.24.0")
    fleet.instances[TUNED.name] = view
    fleet.gpus = {each.uuid: each for each in (gpu(0, 24_000), gpu(1, 24_000))}
    copy = replace(residency("spread", LLAMA_70B, 1, 1, state=ResidencyState.PLANNED, load=1), reason="fits")
    booked = reservation(1, "spread", LLAMA_70B, [(0, 1), (1, 1)])
    fleet.residencies[key("spread", LLAMA_70B)] = copy
    fleet.reservations[booked.load_id] = booked
    load = send(fleet, copy, booked, 1.0)
    assert load.reason.startswith("fits; 0.24.0 by itself would leave ")
    assert load.reason.endswith(" of 81 layers on the CPU: all are asked for")
    assert fleet.replicas[key("spread", LLAMA_70B)].reason == load.reason


def test_other_loads_have_no_text_about_spilling() -> None:
    facts = snapshot([gpu(0, 24_000), gpu(1, 24_000)], [InstanceView(TUNED, InstanceState.READY, "0.24.0")])
    assert explain_override(LLAMA_8B, TUNED, 8192, facts) == ""
    assert explain_override(replace(LLAMA_70B, parameters=(("num_gpu", 40),)), TUNED, 8192, facts) == ""
    assert explain_override(LLAMA_70B, instance("gone", 7), 8192, facts) == ""


@pytest.mark.parametrize(
    ("version", "environment", "totals", "may"),
    [
        ("0.33.0", {}, [8, 24], (False, True)),
        ("0.33.0", {}, [24, 24], (True, True)),
        ("0.33.0", SPREAD, [24, 24], (False, False)),
        ("0.24.0", {}, [8, 24], (False, True)),
        ("0.24.0", SPREAD, [24, 24], (False, False)),
        (None, {}, [8, 24], (False, True)),
        ("0.33.0", {}, [24], (False,)),
    ],
)
def test_a_model_may_go_to_one_gpu_of_several_that_holds_it(
    version: str | None, environment: dict[str, str], totals: list[int], may: tuple[bool, ...]
) -> None:
    spec = replace(TUNED, environment=environment)
    of = model("m", 13_000)
    assert may_take_one_gpu(of, spec, version, 8192, 2, [total * GIB for total in totals]) == may


def test_the_prediction_of_0_33_is_the_file_and_an_f16_cache() -> None:
    assert predicted_bytes(LLAMA_8B, 8192 * 2) == LLAMA_8B.weights_bytes + 2 * 32 * 8 * 128 * 8192 * 2 * 2
