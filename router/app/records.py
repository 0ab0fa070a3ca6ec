"""What the router records of its work: metrics, logs and usage, put together from the settings."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

from router.app.usage import recording
from router.config.settings import Settings
from router.control.controller import Controller, Observer
from router.domain.events import Event, GpusRead
from router.observability.access_log import AccessLog
from router.observability.decision_log import DecisionLog
from router.observability.last_hour import LastHour
from router.observability.logging import RequestLines, writes_json
from router.observability.metrics import FleetMetricsCollector, Metrics
from router.observability.running_request import RunningRequest
from router.observability.slow_requests import SlowRequests
from router.observability.usage_log import UsageLog


class Records:
    """Its observers are those of the controller that is then given to `recording`."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics()
        self.decisions = DecisionLog(self.metrics)
        self._settings = settings
        self._usage = UsageLog() if settings.usage.enabled else None
        self.observers: tuple[Observer, ...] = (self.decisions, *([self._usage] if self._usage is not None else []))
        self.last_hour = LastHour(self.metrics.requests.totals) if settings.dashboard.enabled else None
        """None if the dashboard is off."""
        self._lines = RequestLines(settings.log.level) if writes_json(settings.log.format) else None

    @contextlib.asynccontextmanager
    async def recording(self, controller: Controller) -> AsyncGenerator[AccessLog]:
        """Exports the controller's state as metrics and yields the log of its requests.

        What is still to be written is written at the end of the block.
        """
        fleet = FleetMetricsCollector(
            controller.snapshot, lambda: len(controller.waiting()), controller.fair_share_spread
        )
        self.metrics.registry.register(fleet)
        usage = self._usage
        try:
            async with recording(self._settings, usage, controller) if usage is not None else contextlib.nullcontext():
                yield self._access_log(controller)
        finally:
            if self._lines is not None:
                self._lines.flush()

    def sampling(self, controller: Controller) -> Callable[[Event], None]:
        """The controller's `post`, with a sample for the dashboard after each reading of the GPUs."""
        last_hour, post = self.last_hour, controller.post
        if last_hour is None:
            return post

        def post_and_sample(event: Event) -> None:
            post(event)
            if isinstance(event, GpusRead):
                last_hour.sample(controller.snapshot(), len(controller.waiting()))

        return post_and_sample

    def watch(self, running_requests: Callable[[], list[RunningRequest]]) -> None:
        """Where the requests are found that are with a server now."""
        if self.last_hour is not None:
            self.last_hour.running_requests = running_requests

    def _access_log(self, controller: Controller) -> AccessLog:
        threshold_seconds = self._settings.log.slow_request_seconds
        return AccessLog(
            self.metrics,
            controller.now,
            *([self._lines] if self._lines is not None else []),
            slow=None if threshold_seconds is None else SlowRequests(threshold_seconds, self.decisions.load_times),
            usage=None if self._usage is None else self._usage.record,
        )
