"""One log line and one round of metrics for each request, and the count of requests under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from router.gateway.endings import tokens_of
from router.gateway.requests import RequestInfo
from router.observe import Metrics


class AccessLog:
    """`began` and `ended` enclose every request; `idle` is set while none is under way."""

    def __init__(self, metrics: Metrics, now: Callable[[], float]) -> None:
        self._metrics = metrics
        self._now = now
        self._running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._log = structlog.get_logger("router.access")

    def began(self) -> None:
        self._running += 1
        self._metrics.in_flight.set(self._running)
        self.idle.clear()

    def ended(self, info: RequestInfo, method: str, path: str, status: int) -> None:
        self._running -= 1
        self._metrics.in_flight.set(self._running)
        if not self._running:
            self.idle.set()
        now = self._now()
        values = self._measured(info, status, now)
        write = self._log.info if status < 500 else self._log.warning
        write("request", request_id=info.request_id, client=info.client, method=method, path=path, status=status,
              **values)  # fmt: skip

    def _measured(self, info: RequestInfo, status: int, now: float) -> dict[str, object]:
        """Counts the request and returns what its log line tells beside the request itself."""
        metrics, exchange = self._metrics, info.exchange
        model = metrics.model_label(info.model) if info.instance is not None else ""
        metrics.requests.labels(info.route, model, str(status)).inc()
        duration = now - info.arrived_at
        values: dict[str, object] = {"duration_seconds": round(duration, 6)}
        if info.model:
            values["model"] = info.model
        if info.error_code:
            values["error"] = info.error_code
        if info.instance is None or info.granted_at is None:
            return values
        waited = info.granted_at - info.arrived_at
        values |= {"instance": info.instance, "queue_seconds": round(waited, 6)}
        metrics.queue_wait.labels(model).observe(waited)
        metrics.duration.labels(model).observe(duration)
        if exchange is not None and exchange.first_byte_at is not None:
            first = exchange.first_byte_at - info.arrived_at
            metrics.ttft.labels(model).observe(first)
            tokens = tokens_of(exchange.tail)
            for kind, count in (("prompt", tokens.prompt), ("generation", tokens.output)):
                if count is not None:
                    metrics.tokens.labels(model, kind).inc(count)
            values |= {"first_byte_seconds": round(first, 6), "bytes": exchange.bytes_out}
            values |= {"prompt_tokens": tokens.prompt, "output_tokens": tokens.output}
        return values
