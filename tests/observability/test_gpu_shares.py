"""GPU time and energy are shared between the requests that ran beside each other, and none is lost or made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.gpu import GpuUuid
from router.observability.gpu_shares import PowerReading, Span, shares

A, B = GpuUuid("GPU-a"), GpuUuid("GPU-b")


def _seconds(*spans: Span, beside: tuple[Span, ...] = ()) -> list[float]:
    return [share.gpu_seconds for share in shares(spans, beside, {})]


def test_a_request_alone_has_the_time_that_it_took_on_each_gpu() -> None:
    assert _seconds(Span((A,), 1.0, 4.0)) == [3.0]
    assert _seconds(Span((A, B), 1.0, 4.0)) == [6.0]
    assert _seconds(Span((), 1.0, 4.0)) == [0.0]  # on the CPU


def test_time_is_shared_while_requests_overlap() -> None:
    assert _seconds(Span((A,), 0.0, 4.0), Span((A,), 2.0, 6.0)) == [3.0, 3.0]
    assert _seconds(Span((A,), 0.0, 4.0), beside=(Span((A,), 2.0, 9.0),)) == [3.0]
    assert _seconds(Span((A,), 0.0, 4.0), Span((B,), 0.0, 4.0)) == [4.0, 4.0]
    assert _seconds(Span((A, B), 0.0, 4.0), Span((B,), 0.0, 4.0)) == [6.0, 2.0]


def test_energy_follows_the_readings_of_the_time() -> None:
    readings = {A: (PowerReading(1.0, 100.0), PowerReading(3.0, 300.0))}
    spans = (Span((A,), 0.0, 2.0), Span((A,), 2.0, 5.0))
    # 1 s at 100 W and 1 s at 300 W; 1 s at 300 W, and 2 s at the last reading.
    assert [share.energy_joules for share in shares(spans, (), readings)] == [400.0, 900.0]


def test_a_gpu_that_does_not_report_its_power_adds_time_but_no_energy() -> None:
    (share,) = shares((Span((A, B), 0.0, 2.0),), (), {A: (PowerReading(5.0, 50.0),)})
    assert share == (4.0, 100.0)


_TIMES = st.floats(0.0, 100.0).map(lambda value: round(value, 3))
_SPANS = st.lists(
    st.tuples(st.sampled_from([(A,), (B,), (A, B), ()]), _TIMES, _TIMES).map(
        lambda made: Span(made[0], min(made[1:]), max(made[1:]))
    ),
    max_size=12,
)


def _busy_seconds(gpu: GpuUuid, spans: list[Span]) -> float:
    """How long at least one of them ran."""
    busy, until = 0.0, 0.0
    for span in sorted((s for s in spans if gpu in s.gpus), key=lambda s: s.began_at):
        busy += max(0.0, span.ended_at - max(until, span.began_at))
        until = max(until, span.ended_at)
    return busy


@given(_SPANS, _SPANS)
def test_all_shares_together_are_the_time_that_the_gpus_were_busy(finished: list[Span], others: list[Span]) -> None:
    everything = [*finished, *others]
    found = shares(everything, (), {A: (PowerReading(0.0, 10.0),), B: (PowerReading(0.0, 10.0),)})
    busy = _busy_seconds(A, everything) + _busy_seconds(B, everything)
    assert sum(share.gpu_seconds for share in found) == pytest.approx(busy, abs=1e-6)
    assert sum(share.energy_joules for share in found) == pytest.approx(10.0 * busy, abs=1e-5)
    assert [share.gpu_seconds for share in shares(finished, others, {})] == pytest.approx(
        [share.gpu_seconds for share in found[: len(finished)]]
    )
