"""What loads have shown: servers' reports before readings of GPUs, and one load's parts carried to every other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.footprint import FootprintKey, GpuFootprint, MeasuredFootprint
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.policy import Policy
from router.domain.reservation import Reservation
from router.domain.snapshot import Snapshot
from router.engines.ollama.footprint_estimator import estimated_footprint, footprint_key
from router.lab.scenarios import model_facts
from router.scheduler.placement.footprint_prediction import FootprintPredictor
from router.scheduler.placement.measured_footprints import Footprints
from tests.scheduler.builders import GB, MIB, gpu, gpu_id, instance, snapshot

LLAMA_8B = model_facts("llama3.1:8b")
ONE = instance("gpu0", 0, slots=2)
TWO = replace(instance("pair", 0, 1, slots=2), environment={"OLLAMA_SCHED_SPREAD": "1"})
KEY = FootprintKey(LLAMA_8B.blob, 1, 8192, 2, "f16", version="0.34")
USED = {gpu_id(0): 1 * GB}


def _reservation(size: int) -> Reservation:
    return Reservation(LoadId(1), InstanceName("gpu0"), LLAMA_8B.blob, ((gpu_id(0), size),), 0.0)


def _measure(
    seen: Footprints, taken: int, expected: int, reported: int = 0, parts: tuple[GpuFootprint, ...] = ()
) -> MeasuredFootprint | None:
    start = seen.before(KEY, (gpu_id(0),), USED)
    return seen.after(start, _reservation(expected), {gpu_id(0): 1 * GB + taken}, reported, parts, 400 * MIB)


def test_a_reading_near_the_estimate_is_believed_at_once() -> None:
    seen = Footprints()
    assert _measure(seen, 7 * GB, 6 * GB) == MeasuredFootprint(KEY, (7 * GB,))
    assert seen.known[KEY].per_gpu_bytes == (7 * GB,)


@pytest.mark.parametrize("taken", [2 * GB, 11 * GB])
def test_a_reading_far_from_the_estimate_is_believed_when_it_repeats(taken: int) -> None:
    seen = Footprints()
    assert _measure(seen, taken, 6 * GB) is None
    assert _measure(seen, taken + 100 * MIB, 6 * GB) == MeasuredFootprint(KEY, (taken + 100 * MIB,))


def test_a_reading_that_does_not_repeat_is_not_believed() -> None:
    seen = Footprints()
    assert _measure(seen, 11 * GB, 6 * GB) is None
    assert _measure(seen, 14 * GB, 6 * GB) is None


def test_what_the_server_says_is_taken_whatever_the_estimate_and_others_do() -> None:
    seen = Footprints()
    parts = (GpuFootprint(weights_bytes=2 * GB, kv_cache_bytes=1 * GB, compute_buffer_bytes=100 * MIB),)
    found = _measure(seen, 20 * GB, 12 * GB, parts=parts)
    assert found is not None
    assert found.per_gpu_bytes == (
        3 * GB + 500 * MIB,
    )  # the context as estimated: the reading shows other programs too


def test_a_context_that_the_reading_shows_replaces_the_estimated_one() -> None:
    parts = (GpuFootprint(weights_bytes=2 * GB),)
    found = _measure(Footprints(), 2 * GB + 297 * MIB, 3 * GB, parts=parts)
    assert found is not None
    assert found.parts[0].cuda_context_bytes == 297 * MIB


def _facts() -> Snapshot:
    views = [InstanceView(spec, InstanceState.READY, "0.34.0") for spec in (ONE, TWO)]
    return snapshot([gpu(0, 24_000), gpu(1, 24_000)], views, policy=Policy(vram_margin_bytes=0))


@pytest.mark.parametrize("spec", [ONE, TWO])
@pytest.mark.parametrize("context", [4096, 32_768])
def test_one_load_s_parts_carry_to_other_contexts_and_gpu_counts(spec: object, context: int) -> None:
    """True sizes: weights 3 % more, cache 9 times less, buffers 40 % more than estimated."""
    facts, seen = _facts(), Footprints()

    def true_sizes(on: object, tokens: int) -> tuple[GpuFootprint, ...]:
        assert isinstance(on, type(ONE))
        return tuple(
            replace(
                part,
                weights_bytes=int(1.03 * part.weights_bytes),
                kv_cache_bytes=part.kv_cache_bytes // 9,
                compute_buffer_bytes=int(1.4 * part.compute_buffer_bytes),
                cuda_context_bytes=300 * MIB,
            )
            for part in estimated_footprint(LLAMA_8B, on, tokens, facts).gpus
        )

    shown = true_sizes(ONE, 8192)
    key = footprint_key(LLAMA_8B, ONE, 8192, "0.34.0")
    seen.remember(MeasuredFootprint(key, tuple(part.total_bytes for part in shown), shown))
    assert isinstance(spec, type(ONE))
    predicted = FootprintPredictor(seen)(LLAMA_8B, spec, context, facts)
    truth = [part.total_bytes for part in true_sizes(spec, context)]
    assert list(predicted) == pytest.approx(truth, rel=0.01)


def test_without_parts_the_difference_is_carried_for_as_many_gpus() -> None:
    facts, seen = _facts(), Footprints()
    (estimate,) = estimated_footprint(LLAMA_8B, ONE, 8192, facts).per_gpu_bytes
    (longer,) = estimated_footprint(LLAMA_8B, ONE, 16_384, facts).per_gpu_bytes
    seen.remember(MeasuredFootprint(footprint_key(LLAMA_8B, ONE, 8192, "0.34.0"), (estimate - 500 * MIB,)))
    assert FootprintPredictor(seen)(LLAMA_8B, ONE, 16_384, facts) == (longer - 500 * MIB,)
