"""Access log lines and request metrics."""

from __future__ import annotations

import asyncio
import json

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router import __version__
from router.domain.instance import InstanceName
from router.errors import RETRY_REASONS
from router.observability.access_log import AccessLog
from router.observability.logging import RequestLines
from router.observability.metrics import BUCKETS_SECONDS, Metrics
from router.observability.request_record import RequestRecord


def _served(arrived_at: float = 0.0, time_to_first_token: float = 0.3) -> RequestRecord:
    record = RequestRecord(
        "r1", "127.0.0.1", "/api/chat", arrived_at, model="tiny:latest", instance=InstanceName("gpu0")
    )
    record.granted_at = arrived_at + 0.1
    first_byte_at = arrived_at + time_to_first_token
    record.first_byte_at, record.last_byte_at = first_byte_at, first_byte_at + 1.0
    record.bytes_out, record.chunks = 77, 11
    record.tail = b'{"done":true,"prompt_eval_count":3,"eval_count":10}'
    return record


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("llamayard_")
    }


def test_finished_requests_are_counted_and_logged_by_status() -> None:
    metrics, lines = Metrics(), list[tuple[str, dict[str, object]]]()
    log = AccessLog(metrics, lambda: 2.0, lambda level, values: lines.append((level, values)))
    for _ in range(2):
        log.began()
    log.ended(_served(), "POST", "/api/chat", 200)
    assert not log.idle.is_set()
    log.ended(RequestRecord("r2", "127.0.0.1", "other", 1.0, error_code="not_found"), "GET", "/nope", 502)
    assert log.idle.is_set()
    samples = _samples(metrics)
    model = (("model", "tiny:latest"),)
    assert samples["llamayard_requests_total", (*model, ("route", "/api/chat"), ("status", "200"))] == 1
    assert samples["llamayard_requests_total", (("model", ""), ("route", "other"), ("status", "502"))] == 1
    assert samples["llamayard_requests_running", ()] == 0
    replica = (("instance", "gpu0"), *model)
    assert samples["llamayard_tokens_total", (*replica, ("type", "generation"))] == 10
    assert samples["llamayard_tokens_total", (*replica, ("type", "prompt"))] == 3
    assert samples["llamayard_time_to_first_token_seconds_sum", model] == 0.3
    assert samples["llamayard_request_queue_time_seconds_count", model] == 1
    assert samples["llamayard_request_duration_seconds_bucket", (("le", "2.5"), *model)] == 1
    assert samples["llamayard_request_duration_seconds_bucket", (("le", "1.0"), *model)] == 0
    (level, first), (worse, second) = lines
    assert (level, worse, second["error"]) == ("info", "warning", "not_found")
    assert (first["output_tokens"], first["chunks_per_second"], first["bytes"]) == (10, 10.0, 77)


@pytest.mark.parametrize(
    ("route", "status", "level"),
    [
        ("/health", 200, "debug"),
        ("/metrics", 200, "debug"),
        ("/", 200, "debug"),
        ("/ready", 503, "debug"),  # while it starts or drains, which has log lines of its own
        ("/metrics", 403, "info"),
        ("/metrics", 500, "warning"),
        ("/api/tags", 200, "info"),
        ("/llamayard/status", 200, "info"),
    ],
)
def test_probes_that_work_are_logged_at_debug(route: str, status: int, level: str) -> None:
    metrics, levels = Metrics(), list[str]()
    log = AccessLog(metrics, lambda: 0.0, lambda level, _: levels.append(level))
    log.began()
    log.ended(RequestRecord("r1", "127.0.0.1", route, 0.0), "GET", route, status)
    assert levels == [level]
    assert (
        _samples(metrics)["llamayard_requests_total", (("model", ""), ("route", route), ("status", str(status)))] == 1
    )


@pytest.mark.parametrize(
    ("tail", "chunks", "seconds"),
    [
        (b'{"done":true,"eval_count":21}', 11, 0.05),  # 20 gaps in one second: chunks may hold several tokens
        (b"", 11, 0.1),
        (b'{"done":true,"eval_count":1}', 2, None),
        (b'{"done":true,"eval_count":21}', 1, None),  # not streamed
    ],
)
def test_the_mean_time_between_tokens_of_a_stream_is_recorded(tail: bytes, chunks: int, seconds: float | None) -> None:
    metrics = Metrics()
    log = AccessLog(metrics, lambda: 2.0, lambda *_: None)
    record = _served()
    record.tail, record.chunks = tail, chunks
    log.began()
    log.ended(record, "POST", "/api/chat", 200)
    samples, name = _samples(metrics), "llamayard_request_time_per_output_token_seconds"
    model = (("model", "tiny:latest"),)
    assert samples[f"{name}_count", model] == (seconds is not None)
    assert samples[f"{name}_sum", model] == pytest.approx(seconds or 0.0)


def test_retries_are_counted_by_reason_and_logged() -> None:
    metrics, lines = Metrics(), list[dict[str, object]]()
    log = AccessLog(metrics, lambda: 2.0, lambda _, values: lines.append(values))
    before = _samples(metrics)
    assert [before["llamayard_retries_total", (("reason", reason),)] for reason in RETRY_REASONS] == [0, 0, 0, 0]
    for reasons in (("runner_died", "unreachable"), ("runner_died",), ()):
        record = _served()
        record.retry_reasons = reasons
        log.began()
        log.ended(record, "POST", "/api/chat", 200)
    samples = _samples(metrics)
    assert samples["llamayard_retries_total", (("reason", "runner_died"),)] == 2
    assert samples["llamayard_retries_total", (("reason", "unreachable"),)] == 1
    assert [line.get("retries") for line in lines] == [2, 1, None]


def test_the_lateness_of_the_event_loop_is_a_histogram() -> None:
    metrics = Metrics()
    for seconds in (-0.001, 0.004, 0.3):
        metrics.loop_lag.observe(seconds)
    samples = _samples(metrics)
    assert samples["llamayard_event_loop_lag_seconds_bucket", (("le", "0.001"),)] == 1
    assert samples["llamayard_event_loop_lag_seconds_bucket", (("le", "0.005"),)] == 2
    assert samples["llamayard_event_loop_lag_seconds_sum", ()] == pytest.approx(0.304)


def test_the_version_is_exported() -> None:
    assert _samples(Metrics())["llamayard_build_info", (("version", __version__),)] == 1


def test_a_response_without_token_counts_is_logged_without_them() -> None:
    lines = list[dict[str, object]]()
    log = AccessLog(Metrics(), lambda: 2.0, lambda _, values: lines.append(values))
    record = _served()
    record.tail = b""
    log.began()
    log.ended(record, "POST", "/api/chat", 200)
    assert {"time_to_first_token_seconds", "prompt_tokens", "output_tokens"} & lines[0].keys() == {
        "time_to_first_token_seconds"
    }


def test_histogram_buckets_are_cumulative() -> None:
    metrics = Metrics()
    log = AccessLog(metrics, lambda: 0.0, lambda *_: None)
    times = (*BUCKETS_SECONDS, 0.0, 1000.0)
    for time_to_first_token in times:
        log.began()
        log.ended(_served(time_to_first_token=time_to_first_token), "POST", "/api/chat", 200)
    samples = _samples(metrics)
    for bound in (*map(str, BUCKETS_SECONDS), "+Inf"):
        labels = (("le", bound), ("model", "tiny:latest"))
        expected = sum(time <= float(bound) for time in times)
        assert samples["llamayard_time_to_first_token_seconds_bucket", labels] == expected


async def test_access_log_lines_are_written_as_json_in_batches() -> None:
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


async def test_access_log_lines_are_written_without_a_flush() -> None:
    out = asyncio.get_running_loop().create_future()
    RequestLines("info", out.set_result)("info", {"event": "request"})
    assert json.loads(await asyncio.wait_for(out, 10.0))["event"] == "request"
