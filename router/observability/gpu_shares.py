"""Shares GPU time, and the energy used in it, equally between the requests that ran on a GPU at the same time. Pure.

Times are seconds on one clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from router.domain.gpu import GpuUuid


class Span(NamedTuple):
    """A request that ran on these GPUs, or still runs at `ended_at`."""

    gpus: tuple[GpuUuid, ...]
    began_at: float
    ended_at: float


class PowerReading(NamedTuple):
    """The power draw of a GPU up to this time, since the reading before it."""

    at: float
    watts: float


class Share(NamedTuple):
    gpu_seconds: float
    energy_joules: float


_NOTHING = Share(0.0, 0.0)


def shares(
    finished: Sequence[Span], others: Sequence[Span], power: Mapping[GpuUuid, Sequence[PowerReading]]
) -> list[Share]:
    """The share of each finished span; `others` ran beside them. A GPU without power readings adds no energy."""
    found = [_NOTHING] * len(finished)
    for gpu in {gpu for span in finished for gpu in span.gpus}:
        beside = [span for span in (*finished, *others) if gpu in span.gpus and span.ended_at > span.began_at]
        meter = _Meter(beside, power.get(gpu, ()))
        for number, span in enumerate(finished):
            if gpu in span.gpus and span.ended_at > span.began_at:
                found[number] = _sum(found[number], meter.share(span))
    return found


class _Meter:
    """What one request that ran on the GPU all the time would have been given by each time."""

    def __init__(self, spans: Sequence[Span], readings: Sequence[PowerReading]) -> None:
        times = {time for span in spans for time in (span.began_at, span.ended_at)}
        self._times = sorted(times | {reading.at for reading in readings})
        steps = dict.fromkeys(self._times, 0)
        for span in spans:
            steps[span.began_at] += 1
            steps[span.ended_at] -= 1
        read_at = [reading.at for reading in readings]
        running, seconds, joules = 0, [0.0], [0.0]
        for begin, end in pairwise(self._times):
            running += steps[begin]
            share = (end - begin) / running if running else 0.0
            seconds.append(share)
            joules.append(share * _watts(readings, read_at, end))
        self._seconds, self._joules = list(accumulate(seconds)), list(accumulate(joules))

    def share(self, span: Span) -> Share:
        begin, end = bisect_left(self._times, span.began_at), bisect_left(self._times, span.ended_at)
        return Share(self._seconds[end] - self._seconds[begin], self._joules[end] - self._joules[begin])


def _watts(readings: Sequence[PowerReading], read_at: Sequence[float], until: float) -> float:
    """The draw in a stretch of time that ends then: the first reading at or after it, else the last one."""
    return readings[min(bisect_left(read_at, until), len(readings) - 1)].watts if readings else 0.0


def _sum(one: Share, other: Share) -> Share:
    return Share(one.gpu_seconds + other.gpu_seconds, one.energy_joules + other.energy_joules)
