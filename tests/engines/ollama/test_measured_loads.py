"""The estimator beside what real servers took on real GPUs, part by part: docs/footprints.md shows the table."""

from __future__ import annotations

import pytest

from tests.engines.ollama.measured_loads import MIB, MeasuredLoad, measured_loads

LOADS = {load.id: load for load in measured_loads()}
UNDER_MAX_MIB = 150
"""What a load may take beyond the estimate with its margin."""
MARGIN_RATIO, MARGIN_MIB = 0.02, 512
"""Kept free of every load: `unseen_margin_ratio` of the estimate, and `placement.vram_margin_bytes` on each GPU."""

OPEN = {
    "gemma4-e4b-4cards": "4.5 GiB on the last of four GPUs are not explained: a safety there, too much on two others",
    "qwen3.5-27b-32k": "1.3 GB less than weights and cache add up to; the metadata does not tell why",
}
"""Loads that no formula meets, with what keeps it from them. They are never estimated too small all the same."""


def _with(part: str) -> list[str]:
    return [name for name, load in LOADS.items() if part in load.measured]


@pytest.mark.parametrize("name", _with("weights_mib"))
def test_weights_are_within_two_percent_of_the_log(name: str) -> None:
    load = LOADS[name]
    seen = sum(load.measured["weights_mib"])
    estimated = (load.estimate.weights_bytes + load.estimate.projector_bytes) / MIB
    assert estimated == pytest.approx(seen, rel=0.02, abs=100)


@pytest.mark.parametrize("name", _with("kv_cache_mib"))
def test_the_kv_cache_is_within_five_percent_of_the_log(name: str) -> None:
    load = LOADS[name]
    assert load.estimate.kv_cache_bytes / MIB == pytest.approx(sum(load.measured["kv_cache_mib"]), rel=0.05, abs=100)
    if load.gpus > 1:
        by_gpu = [gpu.kv_cache_bytes / MIB for gpu in load.estimate.gpus]
        assert by_gpu == pytest.approx(load.measured["kv_cache_mib"], rel=0.05, abs=100)


@pytest.mark.parametrize("name", _with("recurrent_state_mib"))
def test_recurrent_state_is_what_the_log_says(name: str) -> None:
    load = LOADS[name]
    assert load.estimate.recurrent_state_bytes / MIB == pytest.approx(
        sum(load.measured["recurrent_state_mib"]), abs=0.1
    )


@pytest.mark.parametrize("name", [name for name in _with("compute_buffer_mib") if name not in OPEN])
def test_compute_buffers_are_within_fifteen_percent_on_each_gpu(name: str) -> None:
    load = LOADS[name]
    by_gpu = [gpu.compute_buffer_bytes / MIB for gpu in load.estimate.gpus]
    assert len(by_gpu) == len(load.measured["compute_buffer_mib"])
    for estimated, seen in zip(by_gpu, load.measured["compute_buffer_mib"], strict=True):
        assert estimated == pytest.approx(seen, rel=0.15, abs=120)


@pytest.mark.parametrize("name", [name for name, load in LOADS.items() if load.kind == "log" and name not in OPEN])
def test_totals_of_logs_are_within_two_percent_of_what_was_logged(name: str) -> None:
    load = LOADS[name]
    estimated, seen = _logged_mib(load)
    assert estimated == pytest.approx(seen, rel=0.02, abs=(100 if len(load.measured) > 1 else 120) * load.gpus)


@pytest.mark.parametrize(
    "name", [name for name, load in LOADS.items() if load.kind in ("ps", "smi") and name not in OPEN]
)
def test_totals_of_ps_and_nvidia_smi_are_within_five_percent(name: str) -> None:
    load = LOADS[name]
    estimated, seen = _total_mib(load)
    assert any(each == pytest.approx(seen, rel=0.05, abs=500) for each in estimated)


@pytest.mark.parametrize("name", LOADS)
def test_no_load_takes_more_than_its_estimate_with_the_margin(name: str) -> None:
    load = LOADS[name]
    estimated, seen = _logged_mib(load) if load.kind == "log" else (max(_total_mib(load)[0]), _total_mib(load)[1])
    margin = MARGIN_RATIO * load.estimate.total_bytes / MIB + MARGIN_MIB
    assert estimated + margin >= seen - UNDER_MAX_MIB


def _logged_mib(load: MeasuredLoad) -> tuple[float, float]:
    """Estimate and log, over the parts that the log has."""
    e = load.estimate
    parts = {
        "weights_mib": e.weights_bytes + e.projector_bytes,
        "kv_cache_mib": e.kv_cache_bytes,
        "compute_buffer_mib": e.compute_buffer_bytes,
        "recurrent_state_mib": e.recurrent_state_bytes,
    }
    estimated = sum(size for part, size in parts.items() if part in load.measured)
    return estimated / MIB, sum(sum(load.measured[part]) for part in parts if part in load.measured)


def _total_mib(load: MeasuredLoad) -> tuple[tuple[float, ...], float]:
    """What could be meant by the total, and the total: `ps` counts no CUDA context, and up to 0.24 may count the
    embedding table that host memory holds."""
    total = load.estimate.total_bytes
    if "process_on_gpu_mib" in load.measured:
        return (total / MIB,), sum(load.measured["process_on_gpu_mib"])
    on_gpus = total - load.estimate.cuda_context_bytes
    return (on_gpus / MIB, (on_gpus + load.host_bytes) / MIB), load.measured["ps_size_gb"] * 1e9 / MIB
