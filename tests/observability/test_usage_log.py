"""Finished requests become usage by client and model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from router.domain.events import GpusRead, Ticked
from router.domain.instance import InstanceName
from router.domain.usage import UsageTotals
from router.observability.access_log import AccessLog
from router.observability.metrics import Metrics
from router.observability.request_record import RequestRecord
from router.observability.usage_log import Batch, FinishedRequest, UsageLog
from tests.scheduler.builders import gpu, view

GPU0, SPREAD = InstanceName("gpu0"), InstanceName("spread")
VIEWS = {GPU0: view("gpu0", 0), SPREAD: view("spread", 0, 1)}


def _finished(client: str, began_at: float, ended_at: float, instance: InstanceName = GPU0) -> FinishedRequest:
    return FinishedRequest(client, "tiny", instance, began_at, ended_at, 3, 10)


def _take(log: UsageLog, now: float, running: Iterable[tuple[InstanceName, float]] = ()) -> Batch:
    batch = log.take(VIEWS, running, now)
    assert batch is not None
    return batch


def test_usage_is_summed_by_client_and_model_and_taken_once() -> None:
    log = UsageLog()
    for request in (_finished("a", 0.0, 2.0), _finished("b", 2.0, 3.0, SPREAD), _finished("a", 4.0, 5.0)):
        log.record(request)
    totals = _take(log, 6.0).totals()
    assert totals == {("a", "tiny"): UsageTotals(2, 6, 20, 3.0, 0.0), ("b", "tiny"): UsageTotals(1, 3, 10, 2.0, 0.0)}
    assert log.take(VIEWS, (), 7.0) is None


def test_a_request_that_still_runs_takes_its_share_and_is_itself_given_the_rest_later() -> None:
    log = UsageLog()
    log.record(_finished("short", 2.0, 4.0))
    assert _take(log, 5.0, [(GPU0, 0.0)]).totals()["short", "tiny"].gpu_seconds == 1.0
    log.record(_finished("long", 0.0, 10.0))
    assert _take(log, 11.0).totals()["long", "tiny"].gpu_seconds == 9.0
    log.record(_finished("later", 11.0, 12.0))
    assert _take(log, 12.0).totals()["later", "tiny"].gpu_seconds == 1.0


def test_energy_is_an_hour_of_watts_shared() -> None:
    log, reading = UsageLog(), replace(gpu(0, 24_000), power_draw_watts=360.0)
    log.observe(GpusRead((reading,), 0.0), [], 10.0)
    log.observe(GpusRead((replace(reading, power_draw_watts=999.0, error="lost"),), 0.0), [], 11.0)
    log.observe(Ticked(), [], 12.0)
    log.record(_finished("a", 0.0, 10.0))
    assert _take(log, 12.0).totals()["a", "tiny"].energy_wh == pytest.approx(1.0)


def test_an_instance_that_is_gone_is_remembered_with_its_gpus() -> None:
    log = UsageLog()
    log.record(_finished("a", 0.0, 1.0, SPREAD))
    _take(log, 1.0)
    log.record(_finished("a", 2.0, 3.0, SPREAD))
    batch = log.take({}, (), 4.0)
    assert batch is not None
    assert batch.totals()["a", "tiny"].gpu_seconds == 2.0


@pytest.mark.parametrize(
    ("tail", "output"),
    [(b'{"done":true,"prompt_eval_count":3,"eval_count":10}', 10), (b"", 7)],  # else a chunk is about a token
)
def test_the_access_log_records_what_had_a_slot(tail: bytes, output: int) -> None:
    found = list[FinishedRequest]()
    log = AccessLog(Metrics(), lambda: 9.0, lambda *_: None, usage=found.append)
    record = RequestRecord("r1", "user:ann", "/api/chat", 1.0, model="tiny", instance=GPU0, granted_at=2.0)
    record.first_byte_at, record.last_byte_at, record.chunks, record.tail = 3.0, 8.0, 7, tail
    for each in (record, RequestRecord("r2", "user:ann", "/api/chat", 1.0, model="tiny", error_code="queue_full")):
        log.began()
        log.ended(each, "POST", "/api/chat", 200)
    assert found == [FinishedRequest("user:ann", "tiny", GPU0, 2.0, 9.0, 3 if tail else 0, output)]
