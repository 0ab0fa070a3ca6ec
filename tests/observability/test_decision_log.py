"""What is counted of the scheduler's decisions."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.domain.actions import Load, Unload, UnloadCause
from router.domain.events import GpusRead, LoadFailed, LoadFinished, Ticked
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.request import RunnerOptions
from router.errors import ERROR_CODES
from router.observability.decision_log import DecisionLog
from router.observability.metrics import Metrics
from tests.scheduler.builders import gpu, model

GPU0 = InstanceName("gpu0")


def _load(load_id: int, evicted: int = 0) -> Load:
    facts = model("tiny")
    return Load(LoadId(load_id), GPU0, "", facts, RunnerOptions(), True, 600.0, "", evicted)


def _by_label(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        sample.labels[label]: sample.value for family in families for sample in family.samples if sample.name == name
    }


def test_rejections_of_every_code_are_exported_from_the_start() -> None:
    rejections = _by_label(Metrics(), "llamayard_rejections_total", "code")
    assert rejections == dict.fromkeys(ERROR_CODES, 0.0)
    assert "queue_full" in rejections


def test_outcomes_of_a_load_are_exported_as_zero_while_it_runs() -> None:
    metrics = Metrics()
    log = DecisionLog(metrics)
    log.observe(Ticked(), [_load(1)], 0.0)
    zeros = {"loaded": 0.0, "failed": 0.0, "spilled": 0.0, "broken_off": 0.0}
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == zeros
    assert _by_label(metrics, "llamayard_loads_created", "outcome").keys() == zeros.keys()
    log.observe(LoadFailed(LoadId(1), 500, "no"), [_load(2)], 1.0)
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == {**zeros, "failed": 1.0}
    log.observe(LoadFinished(LoadId(2), 10, 10), [], 2.0)
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == {**zeros, "failed": 1.0, "loaded": 1.0}


def test_unloads_are_counted_by_cause() -> None:
    metrics = Metrics()
    log, tiny = DecisionLog(metrics), model("tiny")
    for cause in (UnloadCause.EVICTED, UnloadCause.EVICTED, UnloadCause.EXPIRED):
        log.observe(Ticked(), [Unload(GPU0, "", tiny, tiny.blob, "why", cause)], 0.0)
    assert _by_label(metrics, "llamayard_unloads_total", "cause") == {"evicted": 2.0, "expired": 1.0}


def test_a_load_for_which_others_were_unloaded_is_a_swap() -> None:
    metrics = Metrics()
    log = DecisionLog(metrics)
    log.observe(Ticked(), [_load(1)], 0.0)
    assert _by_label(metrics, "llamayard_swaps_total", "model") == {"tiny": 0.0}
    log.observe(Ticked(), [_load(2, evicted=2)], 0.0)
    assert _by_label(metrics, "llamayard_swaps_total", "model") == {"tiny": 1.0}


def test_a_model_that_is_loaded_whole_after_a_spill_counts_as_healed_once() -> None:
    metrics = Metrics()
    log, size = DecisionLog(metrics), model("tiny").weights_bytes

    def load(load_id: int, in_vram: int) -> float | None:
        log.observe(Ticked(), [_load(load_id)], 0.0)
        log.observe(LoadFinished(LoadId(load_id), size, in_vram), [], 1.0)
        return metrics.registry.get_sample_value("llamayard_spills_healed_total")

    assert [load(1, size), load(2, size // 2), load(3, size // 2), load(4, size), load(5, size)] == [0, 0, 0, 1, 1]


def test_errors_of_a_gpu_are_counted_when_they_appear() -> None:
    metrics = Metrics()
    log, well = DecisionLog(metrics), gpu(0, 24_000)
    lost = replace(well, error="GPU is lost")
    for reading in (well, lost, lost, well, lost):
        log.observe(GpusRead((reading,), 0.0), [], 0.0)
    assert _by_label(metrics, "llamayard_gpu_errors_total", "index") == {"0": 2.0}
