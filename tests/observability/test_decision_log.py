"""What is counted of the scheduler's decisions."""

from __future__ import annotations

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.domain.actions import Load
from router.domain.events import LoadFailed, LoadFinished, Ticked
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.request import RunnerOptions
from router.errors import ERROR_CODES
from router.observability.decision_log import DecisionLog
from router.observability.metrics import Metrics
from tests.scheduler.builders import model


def _load(load_id: int) -> Load:
    facts = model("tiny")
    return Load(LoadId(load_id), InstanceName("gpu0"), "", facts, RunnerOptions(), True, 600.0, "")


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
    zeros = {"loaded": 0.0, "failed": 0.0, "spilled": 0.0}
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == zeros
    assert _by_label(metrics, "llamayard_loads_created", "outcome").keys() == zeros.keys()
    log.observe(LoadFailed(LoadId(1), 500, "no"), [_load(2)], 1.0)
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == {**zeros, "failed": 1.0}
    log.observe(LoadFinished(LoadId(2), 10, 10), [], 2.0)
    assert _by_label(metrics, "llamayard_loads_total", "outcome") == {**zeros, "failed": 1.0, "loaded": 1.0}
