"""Slow requests and what they spent their time on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.instance import InstanceName
from router.observability.access_log import AccessLog
from router.observability.metrics import Metrics
from router.observability.request_record import RequestRecord
from router.observability.slow_requests import LoadTimes, SlowRequests

_GPU0 = InstanceName("gpu0")


def _record(route: str = "/api/chat", *, instance: InstanceName | None = _GPU0) -> RequestRecord:
    """Arrived at 100, granted at 130, first byte at 132."""
    record = RequestRecord("r1", "10.0.0.1", route, 100.0, model="tiny", instance=instance)
    if instance is not None:
        record.granted_at, record.first_byte_at, record.last_byte_at = 130.0, 132.0, 140.0
    return record


def _logged(record: RequestRecord, slow: SlowRequests | None, now: float = 140.0) -> list[dict[str, object]]:
    lines = list[dict[str, object]]()
    log = AccessLog(Metrics(), lambda: now, lambda _, values: lines.append(values), slow=slow)
    log.began()
    log.ended(record, "POST", record.route, 200)
    return [line for line in lines if line["event"] == "slow_request"]


def test_a_slow_request_is_logged_with_its_parts() -> None:
    loads = LoadTimes()
    loads.record("gpu0", "tiny", 105.0, 125.0)
    loads.record("gpu1", "tiny", 100.0, 130.0)
    (line,) = _logged(_record(), SlowRequests(40.0, loads))
    parts = ("queue_seconds", "load_seconds", "prefill_seconds", "stream_seconds")
    assert [line[part] for part in parts] == [10.0, 20.0, 2.0, 8.0]
    assert (line["request_id"], line["model"], line["instance"], line["duration_seconds"]) == ("r1", "tiny", "gpu0", 40)


@pytest.mark.parametrize("slow", [None, SlowRequests(40.1, LoadTimes())])
def test_a_request_below_the_threshold_is_not_logged_as_slow(slow: SlowRequests | None) -> None:
    assert _logged(_record(), slow) == []


def test_a_request_that_never_got_a_slot_has_only_waited() -> None:
    (line,) = _logged(_record(instance=None), SlowRequests(1.0, LoadTimes()))
    assert (line["queue_seconds"], line["load_seconds"], line["prefill_seconds"], line["stream_seconds"]) == (
        40,
        0,
        0,
        0,
    )
    assert "instance" not in line


def test_a_long_pull_is_not_slow() -> None:
    assert _logged(_record("/api/pull"), SlowRequests(1.0, LoadTimes())) == []


def test_the_last_load_counts_and_old_ones_are_dropped() -> None:
    loads = LoadTimes()
    loads.record("gpu0", "tiny", 0.0, 50.0)
    loads.record("gpu0", "tiny", 110.0, 112.0)
    assert loads.overlap_seconds("gpu0", "tiny", 100.0, 130.0) == 2.0
    for number in range(1_000):
        loads.record("gpu0", f"m{number}", 110.0, 112.0)
    assert loads.overlap_seconds("gpu0", "tiny", 100.0, 130.0) == 0.0
    assert loads.overlap_seconds("gpu0", "m0", 100.0, 130.0) == 2.0


_SECONDS = st.floats(0.0, 1e4)


@given(waited=_SECONDS, prefill=_SECONDS, streamed=_SECONDS, load=st.tuples(_SECONDS, _SECONDS))
def test_the_parts_are_never_negative_and_add_up(
    waited: float, prefill: float, streamed: float, load: tuple[float, float]
) -> None:
    loads, record = LoadTimes(), _record()
    loads.record("gpu0", "tiny", min(load), max(load))
    record.granted_at = record.arrived_at + waited
    record.first_byte_at = record.granted_at + prefill
    duration = waited + prefill + streamed
    phases = SlowRequests(0.0, loads).phases(record, duration)
    assert phases is not None
    assert all(seconds >= -1e-5 for seconds in phases.values())
    assert sum(phases.values()) == pytest.approx(duration, abs=1e-4)
