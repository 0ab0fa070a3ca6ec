"""What the router records of its work: metrics and logs, put together from the settings."""

from __future__ import annotations

from router.config.settings import Settings
from router.control.controller import Controller
from router.observability.access_log import AccessLog
from router.observability.decision_log import DecisionLog
from router.observability.logging import RequestLines, writes_json
from router.observability.metrics import FleetMetricsCollector, Metrics
from router.observability.slow_requests import SlowRequests


class Records:
    """`close` it at the end: what is still to be written is written then."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics()
        self.decisions = DecisionLog(self.metrics)
        self._settings = settings
        self._lines = RequestLines(settings.log.level) if writes_json(settings.log.format) else None

    def observe(self, controller: Controller) -> AccessLog:
        """Exports the controller's state as metrics; returns the log of its requests."""
        fleet = FleetMetricsCollector(
            controller.snapshot, lambda: len(controller.waiting()), controller.fair_share_spread
        )
        self.metrics.registry.register(fleet)
        threshold_seconds = self._settings.log.slow_request_seconds
        return AccessLog(
            self.metrics,
            controller.now,
            *([self._lines] if self._lines is not None else []),
            slow=None if threshold_seconds is None else SlowRequests(threshold_seconds, self.decisions.load_times),
        )

    def close(self) -> None:
        if self._lines is not None:
            self._lines.flush()
