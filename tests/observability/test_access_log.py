"""What one request leaves behind: a log line, and numbers that add up as Prometheus reads them."""

from __future__ import annotations

import asyncio
import json

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.api.forwarding import Exchange
from router.domain.instance import InstanceName
from router.observability.access_log import AccessLog
from router.observability.logging import RequestLines
from router.observability.metrics import BUCKETS_SECONDS, Metrics
from router.observability.request_record import RequestRecord


def _served(arrived_at: float = 0.0, first: float = 0.3) -> RequestRecord:
    info = RequestRecord("r1", "127.0.0.1", "/api/chat", arrived_at, model="tiny:latest", instance=InstanceName("gpu0"))
    info.granted_at = arrived_at + 0.1
    info.exchange = record = Exchange(started=lambda: 0.0)
    record.first_byte_at, record.last_byte_at = arrived_at + first, arrived_at + first + 1.0
    record.bytes_out, record.chunks = 77, 11
    record.tail = b'{"done":true,"prompt_eval_count":3,"eval_count":10}'
    return info


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("llamayard_")
    }


def test_requests_are_counted_as_they_ended() -> None:
    metrics, lines = Metrics(), list[tuple[str, dict[str, object]]]()
    log = AccessLog(metrics, lambda: 2.0, lambda level, values: lines.append((level, values)))
    for _ in range(2):
        log.began()
    log.ended(_served(), "POST", "/api/chat", 200)
    assert not log.idle.is_set()
    log.ended(RequestRecord("r2", "127.0.0.1", "other", 1.0, error_code="not_found"), "GET", "/nope", 502)
    assert log.idle.is_set()
    found = _samples(metrics)
    model = (("model", "tiny:latest"),)
    assert found["llamayard_requests_total", (*model, ("route", "/api/chat"), ("status", "200"))] == 1
    assert found["llamayard_requests_total", (("model", ""), ("route", "other"), ("status", "502"))] == 1
    assert found["llamayard_requests_running", ()] == 0
    assert found["llamayard_tokens_total", (*model, ("type", "generation"))] == 10
    assert found["llamayard_time_to_first_token_seconds_sum", model] == 0.3
    assert found["llamayard_request_queue_time_seconds_count", model] == 1
    assert found["llamayard_request_duration_seconds_bucket", (("le", "2.5"), *model)] == 1
    assert found["llamayard_request_duration_seconds_bucket", (("le", "1.0"), *model)] == 0
    (level, first), (worse, second) = lines
    assert (level, worse, second["error"]) == ("info", "warning", "not_found")
    assert (first["output_tokens"], first["chunks_per_second"], first["bytes"]) == (10, 10.0, 77)


def test_each_time_is_in_all_buckets_from_its_own_on() -> None:
    metrics = Metrics()
    log = AccessLog(metrics, lambda: 0.0, lambda *_: None)
    times = (*BUCKETS_SECONDS, 0.0, 1000.0)
    for first in times:
        log.began()
        log.ended(_served(first=first), "POST", "/api/chat", 200)
    found = _samples(metrics)
    for bound in (*map(str, BUCKETS_SECONDS), "+Inf"):
        labels = (("le", bound), ("model", "tiny:latest"))
        below = sum(first <= float(bound) for first in times)
        assert found["llamayard_time_to_first_token_seconds_bucket", labels] == below


async def test_lines_are_written_some_at_a_time_as_json() -> None:
    written = list[str]()
    lines = RequestLines("info", written.append)
    lines("debug", {"event": "no"})
    lines("info", {"event": "request", "path": "/ä"})
    lines("warning", {"event": "request", "path": "/b"})
    assert written == []
    lines.flush()
    first, second = map(json.loads, "".join(written).splitlines())
    assert (first["path"], first["level"], first["logger"]) == ("/ä", "info", "router.access")
    assert second["level"] == "warning"
    lines.flush()
    assert len(written) == 1


async def test_lines_are_out_soon_without_being_asked_for() -> None:
    out = asyncio.get_running_loop().create_future()
    RequestLines("info", out.set_result)("info", {"event": "request"})
    assert json.loads(await asyncio.wait_for(out, 10.0))["event"] == "request"
