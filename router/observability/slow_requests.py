"""What a slow request spent its time on: waiting for a slot, loading its model, evaluating its prompt, streaming."""

from __future__ import annotations

from router.llm_api.routes import ROUTES, Kind
from router.observability.request_record import RequestRecord

_LOADS_MAX = 1_000
_LEASED = frozenset(route.path for route in ROUTES if route.kind is Kind.LEASED)
"""Routes that take a slot: others, such as a pull, take as long as they take."""

Phases = dict[str, float]


class LoadTimes:
    """When the last successful load of each model on each instance ran. Times are seconds on the controller's clock."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[float, float]] = {}

    def record(self, instance: str, model: str, began_at: float, ended_at: float) -> None:
        """A load has succeeded."""
        self._last.pop((instance, model), None)
        self._last[instance, model] = (began_at, ended_at)
        if len(self._last) > _LOADS_MAX:
            del self._last[next(iter(self._last))]

    def overlap_seconds(self, instance: str, model: str, since: float, until: float) -> float:
        """How much of that time the load took."""
        began_at, ended_at = self._last.get((instance, model), (0.0, 0.0))
        return max(0.0, min(ended_at, until) - max(began_at, since))


class SlowRequests:
    """Decomposes the requests that took at least `threshold_seconds`."""

    def __init__(self, threshold_seconds: float, loads: LoadTimes) -> None:
        self.threshold_seconds = threshold_seconds
        self._loads = loads

    def phases(self, record: RequestRecord, duration_seconds: float) -> Phases | None:
        """Seconds by phase, which add up to the duration; None for a request that takes no slot.

        `queue_seconds` is all waiting but the load of the model itself, so it includes the time in which others make
        room. `prefill_seconds` ends with the first byte, `stream_seconds` with the request.
        """
        if record.route not in _LEASED:
            return None
        arrived_at, ended_at = record.arrived_at, record.arrived_at + duration_seconds
        granted_at = ended_at if record.granted_at is None else record.granted_at
        first_byte_at = ended_at if record.first_byte_at is None else max(record.first_byte_at, granted_at)
        load_seconds = 0.0
        if record.instance is not None:
            load_seconds = self._loads.overlap_seconds(record.instance, record.model, arrived_at, granted_at)
        return {
            "queue_seconds": round(granted_at - arrived_at - load_seconds, 6),
            "load_seconds": round(load_seconds, 6),
            "prefill_seconds": round(first_byte_at - granted_at, 6),
            "stream_seconds": round(ended_at - first_byte_at, 6),
        }
