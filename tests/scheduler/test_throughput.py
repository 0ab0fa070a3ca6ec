"""The speed of replicas: estimated, then measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.scheduler.balancing.throughput import ThroughputModel, correction, guessed
from tests.scheduler.builders import LLAMA_70B, gpu, gpu_id, instance, key, model

M = model("m", 8000)
GPU_MODELS: dict[GpuUuid, Gpu] = {
    gpu_id(0): gpu(0, 1, clock_hertz=9_751_000_000),
    gpu_id(1): gpu(1, 1, clock_hertz=5_000_000_000),
}


def test_the_estimated_speed_of_a_70b_on_two_3090_is_near_the_measured_one() -> None:
    """16.6 tokens/s, within a third, and 375 tokens/s of prompt, within a half."""
    throughput = guessed(LLAMA_70B.weights_bytes, (936e9, 936e9))
    assert 1 / throughput.step_seconds == pytest.approx(16.6, rel=0.33)
    assert 1 / throughput.prompt_seconds == pytest.approx(375, rel=0.5)


@given(st.integers(0, 10**12), st.lists(st.floats(1e9, 1e13), max_size=4))
def test_every_estimate_is_positive_and_a_faster_gpu_is_not_slower(size: int, gpus: list[float]) -> None:
    throughput = guessed(size, gpus)
    assert 0 < throughput.prompt_seconds < throughput.step_seconds
    assert guessed(size, [rate * 2 for rate in gpus]).step_seconds <= throughput.step_seconds


def test_an_unknown_bandwidth_is_replaced_by_a_default() -> None:
    assert guessed(10**10, (None,)) == guessed(10**10, (5e11,))
    assert guessed(10**10, ()).step_seconds > guessed(10**10, (None,)).step_seconds  # the CPU


@given(st.floats(0.05, 20.0))
def test_the_estimate_converges_to_the_measured_speed(truth: float) -> None:
    expected = 1.0
    for _ in range(80):
        expected *= correction(expected, truth)
    assert expected == pytest.approx(truth, rel=0.01)


@given(st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_one_odd_request_changes_little(expected: float, shown: float) -> None:
    assert 0.8 <= correction(expected, shown) <= 1.61


@given(st.lists(st.tuples(st.floats(0.8, 1.6), st.floats(0.8, 1.6)), max_size=200))
def test_speeds_stay_within_their_limits(corrections: list[tuple[float, float]]) -> None:
    speeds, spec = ThroughputModel(), instance("gpu0", 0)
    throughput = speeds.throughput(spec, M, GPU_MODELS)
    for prompt, step in corrections * 3:
        speeds.correct(key("gpu0", M), prompt, step)
    assert speeds.throughput(spec, M, GPU_MODELS) is throughput
    assert 0 < throughput.prompt_seconds < 1e3
    assert 0 < throughput.step_seconds < 1e3


FAST, SLOW = instance("gpu0", 0), instance("gpu1", 1)


def _speeds(speeds: ThroughputModel, *specs: InstanceSpec, of: ModelFacts = M) -> list[tuple[float, float]]:
    return [
        (throughput.prompt_seconds, throughput.step_seconds)
        for throughput in (speeds.throughput(spec, of, GPU_MODELS) for spec in specs)
    ]


def test_an_unmeasured_replica_uses_its_gpu_and_the_correction_of_its_model() -> None:
    unmeasured, speeds = ThroughputModel(), ThroughputModel()
    (fast, slow) = _speeds(unmeasured, FAST, SLOW)
    assert fast < slow
    _speeds(speeds, FAST)
    for _ in range(3):
        speeds.correct(key("gpu0", M), 1.5, 0.9)
    for before, after in zip((fast, slow), _speeds(speeds, FAST, SLOW), strict=True):
        assert after == pytest.approx((before[0] * 1.5**3, before[1] * 0.9**3))
    other = model("other", 8000)
    assert _speeds(speeds, FAST, of=other) == _speeds(unmeasured, FAST, of=other)


def test_each_replica_keeps_its_own_measurements() -> None:
    speeds = ThroughputModel()
    before = _speeds(speeds, FAST, SLOW)
    speeds.correct(key("gpu1", M), 1.5, 1.5)
    after = _speeds(speeds, FAST, SLOW)
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_an_estimate_made_before_the_gpus_were_read_is_not_cached() -> None:
    speeds = ThroughputModel()
    blind = speeds.throughput(FAST, M, {})
    assert speeds.throughput(FAST, M, GPU_MODELS) != blind


def test_what_is_remembered_has_a_bound() -> None:
    speeds = ThroughputModel()
    for number in range(1200):
        named = model(f"m{number}")
        speeds.throughput(FAST, named, GPU_MODELS)
        speeds.correct(key("gpu0", named), 2.0, 2.0)
    assert len(speeds.known) == 1000
    assert _speeds(speeds, FAST, of=model("m1199")) > _speeds(speeds, FAST, of=model("m0"))
