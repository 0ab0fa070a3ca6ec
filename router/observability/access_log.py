"""One log line and one round of metrics for each request, and the count of requests under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from router.llm_api.stream_end import tokens_of
from router.observability.metrics import Metrics
from router.observability.request_record import RequestRecord

_PROBES = frozenset({"/", "/health", "/ready", "/metrics"})
"""Routes that monitors and load balancers request every few seconds."""
_PROBE_RESULTS = frozenset({200, 503})

Write = Callable[[str, dict[str, object]], None]
"""Takes a level and the values of one line, of which `event` is its name."""


def _to_the_log(level: str, values: dict[str, object]) -> None:
    getattr(structlog.get_logger("router.access"), level)(**values)


class AccessLog:
    """`began` and `ended` enclose every request; `idle` is set while none is under way."""

    def __init__(self, metrics: Metrics, now: Callable[[], float], write: Write = _to_the_log) -> None:
        self._model_label = metrics.model_label
        self._tally = metrics.requests
        self._now = now
        self._write = write
        self.idle = asyncio.Event()
        self.idle.set()

    def began(self) -> None:
        if not self._tally.running:
            self.idle.clear()
        self._tally.running += 1

    def ended(self, info: RequestRecord, method: str, path: str, status: int) -> None:
        self._tally.running -= 1
        if not self._tally.running:
            self.idle.set()
        values: dict[str, object] = {
            "event": "request",
            "request_id": info.request_id,
            "client": info.client,
            "method": method,
            "path": path,
            "status": status,
        }
        self._measure(info, status, values)
        self._write(_level(info.route, status), values)

    def _measure(self, info: RequestRecord, status: int, values: dict[str, object]) -> None:
        """Counts the request and adds what its log line tells beside the request itself."""
        exchange, tally = info.exchange, self._tally
        model = self._model_label(info.model) if info.instance is not None else ""
        tally.record_response(info.route, model, status)
        duration = self._now() - info.arrived_at
        values["duration_seconds"] = round(duration, 6)
        if info.model:
            values["model"] = info.model
        if info.error_code:
            values["error"] = info.error_code
        if info.instance is None or info.granted_at is None:
            return
        waited = info.granted_at - info.arrived_at
        values["instance"] = info.instance
        values["queue_seconds"] = round(waited, 6)
        tally.record_served(model, waited, duration)
        if exchange is None or exchange.first_byte_at is None:
            return
        first = exchange.first_byte_at - info.arrived_at
        tokens = tokens_of(exchange.tail)
        tally.record_output(model, first, tokens.prompt, tokens.output)
        values["time_to_first_token_seconds"] = round(first, 6)
        values["bytes"] = exchange.bytes_out
        if tokens.prompt is not None:
            values["prompt_tokens"] = tokens.prompt
        if tokens.output is not None:
            values["output_tokens"] = tokens.output
        streamed = (exchange.last_byte_at or 0.0) - exchange.first_byte_at
        if exchange.chunks > 1 and streamed > 0:
            values["chunks_per_second"] = round((exchange.chunks - 1) / streamed, 1)


def _level(route: str, status: int) -> str:
    """Returns the log level of a request; a probe that works as documented is logged at debug."""
    if route in _PROBES and status in _PROBE_RESULTS:
        return "debug"
    return "info" if status < 500 else "warning"
