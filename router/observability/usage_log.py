"""Collects finished requests and the GPUs' power draw, and turns them into usage by client and model.

A request costs one append. All the rest is done for a batch of them, away from the event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from router.domain.actions import Action
from router.domain.events import Event, GpusRead
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceView
from router.domain.usage import UsageTotals
from router.observability.gpu_shares import PowerReading, Span, shares

_FINISHED_MAX = 200_000
"""If nothing takes them, the oldest are dropped."""
_EARLIER_MAX = 5_000
"""Finished requests that are remembered because one that ran beside them still runs; then it is given more than due."""
_READINGS_MAX = 3_600
_JOULES_PER_WH = 3600.0


class FinishedRequest(NamedTuple):
    """A request that had a slot. Times are seconds on the controller's clock."""

    client: str
    model: str
    instance: InstanceName
    granted_at: float
    ended_at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Finished requests, with what is needed to share GPU time between them."""

    finished: tuple[FinishedRequest, ...]
    spans: tuple[Span, ...]
    """Of the finished requests."""
    beside: tuple[Span, ...]
    """Of others that ran at the same time, and may run still."""
    power: Mapping[GpuUuid, tuple[PowerReading, ...]]

    def totals(self) -> dict[tuple[str, str], UsageTotals]:
        """Usage by client and model."""
        found: dict[tuple[str, str], UsageTotals] = {}
        for request, share in zip(self.finished, shares(self.spans, self.beside, self.power), strict=True):
            energy_wh = share.energy_joules / _JOULES_PER_WH
            used = UsageTotals(1, request.prompt_tokens, request.output_tokens, share.gpu_seconds, energy_wh)
            key = (request.client, request.model)
            found[key] = found.get(key, UsageTotals()).plus(used)
        return found


class UsageLog:
    """Observes the controller, for the power draw. `record` takes each finished request."""

    def __init__(self) -> None:
        self._finished: deque[FinishedRequest] = deque(maxlen=_FINISHED_MAX)
        self.record = self._finished.append
        self._earlier: tuple[Span, ...] = ()
        self._power: dict[GpuUuid, deque[PowerReading]] = {}
        self._gpus_of: dict[InstanceName, tuple[GpuUuid, ...]] = {}
        """Of all instances seen, since one that was started on demand may be gone when its last request is counted."""

    def observe(self, event: Event, actions: list[Action], now: float) -> None:
        """Keeps the power draw of the GPUs."""
        del actions
        if isinstance(event, GpusRead):
            for gpu in event.gpus:
                if gpu.power_draw_watts is not None and gpu.error is None:
                    readings = self._power.setdefault(gpu.uuid, deque(maxlen=_READINGS_MAX))
                    readings.append(PowerReading(now, gpu.power_draw_watts))

    def take(
        self,
        instances: Mapping[InstanceName, InstanceView],
        running: Iterable[tuple[InstanceName, float]],
        now: float,
    ) -> Batch | None:
        """The requests that have finished since the last call; None without any.

        `running`: instance and time of the grant of each request that holds a slot.
        """
        self._gpus_of.update((name, view.spec.gpus) for name, view in instances.items())
        if not self._finished:
            return None
        finished = tuple(self._finished)
        self._finished.clear()
        spans = tuple(Span(self._gpus_of.get(r.instance, ()), r.granted_at, r.ended_at) for r in finished)
        still = tuple(Span(self._gpus_of.get(instance, ()), began_at, now) for instance, began_at in running)
        power = {gpu: tuple(readings) for gpu, readings in self._power.items()}
        batch = Batch(finished, spans, (*self._earlier, *still), power)
        horizon = min((span.began_at for span in still), default=now)
        earlier = (*self._earlier, *spans) if still else ()
        self._earlier = tuple(span for span in earlier if span.ended_at > horizon)[-_EARLIER_MAX:]
        for readings in self._power.values():
            while len(readings) > 1 and readings[1].at < horizon:
                readings.popleft()
        return batch
