"""The names that `/metrics` exports, with every kind of series once."""

from __future__ import annotations

import re
from dataclasses import replace

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.domain.actions import Load, Unload
from router.domain.events import GpusRead, LoadFinished
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.policy import Pin, Policy
from router.observability.access_log import AccessLog
from router.observability.decision_log import DecisionLog
from router.observability.metrics import FleetMetricsCollector, Metrics
from router.observability.request_record import RequestRecord
from tests.scheduler.builders import gpu, model, residency, snapshot, view


def exported_families() -> set[str]:
    """Names of the router's own metrics; those of counters end in `_total`."""
    families = [f for f in text_string_to_metric_families(exported_text()) if f.name.startswith("llamayard_")]
    return {f.name + "_total" * (f.type == "counter") for f in families if not f.name.endswith("_created")}


def exported_names() -> set[str]:
    """Names of all series, those of the process included."""
    return set(re.findall(r"^(\w+)[{ ]", exported_text(), re.MULTILINE))


def exported_text() -> str:
    """What `/metrics` answers after one load, one unload and one request."""
    metrics, gpu0 = Metrics(), InstanceName("gpu0")
    tiny, device = model("tiny"), replace(gpu(0, 24_000), temperature_celsius=50, power_draw_watts=200.0)
    device = replace(device, power_limit_watts=350.0, utilization_ratio=0.5)
    facts = snapshot((device,), (view("gpu0", 0),), (residency("gpu0", tiny),))
    facts = replace(facts, policy=Policy(pins={"tiny": Pin(keep_warm=True)}), warm_missing={"tiny": "too large"})
    metrics.registry.register(FleetMetricsCollector(lambda: facts, lambda: 0, lambda: 0.0))
    decisions = DecisionLog(metrics)
    load = Load(LoadId(1), gpu0, "", tiny, (), True, 600.0, "")
    decisions.observe(GpusRead((device,), 0.0), [load, Unload(gpu0, "", tiny, tiny.blob, "")], 0.0)
    decisions.observe(LoadFinished(load.load_id, tiny.weights_bytes, tiny.weights_bytes), [], 1.0)
    record = RequestRecord("r", "c", "/api/chat", 0.0, model="tiny", instance=gpu0, granted_at=0.1, first_byte_at=0.2)
    record.last_byte_at, record.chunks = 1.0, 2
    record.tail = b'{"done":true,"prompt_eval_count":3,"eval_count":10}'
    log = AccessLog(metrics, lambda: 2.0, lambda *_: None)
    log.began()
    log.ended(record, "POST", "/api/chat", 200)
    return generate_latest(metrics.registry).decode()
