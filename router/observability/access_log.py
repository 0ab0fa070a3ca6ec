"""Writes one log line and counts one round of metrics for each request, and counts the requests in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from router.domain.instance import InstanceName
from router.llm_api.stream_end import Tokens, tokens_of
from router.observability.metrics import Metrics
from router.observability.request_record import CLIENT_GONE, RequestRecord
from router.observability.slow_requests import SlowRequests
from router.observability.usage_log import FinishedRequest

_PROBES = frozenset({"/", "/health", "/ready", "/metrics"})
"""Routes that monitors and load balancers request every few seconds."""
_PROBE_RESULTS = frozenset({200, 503})
_ERROR_STATUS = 400
_UNKNOWN = Tokens()

WriteLine = Callable[[str, dict[str, object]], None]
"""Takes a level and the values of one line, of which `event` is its name."""


def _write_to_structlog(level: str, values: dict[str, object]) -> None:
    getattr(structlog.get_logger("router.access"), level)(**values)


class AccessLog:
    """`began` and `ended` must enclose every request. `idle` is set while none is in progress."""

    def __init__(
        self,
        metrics: Metrics,
        now: Callable[[], float],
        write: WriteLine = _write_to_structlog,
        *,
        slow: SlowRequests | None = None,
        usage: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        self._model_label = metrics.model_label
        self._tally = metrics.requests
        self._rejections = metrics.rejections
        self._stream_errors = metrics.stream_errors
        self._now = now
        self._write = write
        self._usage = usage
        self._slow = slow
        self._slow_seconds = float("inf") if slow is None else slow.threshold_seconds
        self.idle = asyncio.Event()
        self.idle.set()

    def began(self) -> None:
        if not self._tally.running:
            self.idle.clear()
        self._tally.running += 1

    def ended(self, record: RequestRecord, method: str, path: str, status: int) -> None:
        tally, arrived_at = self._tally, record.arrived_at
        tally.running -= 1
        if not tally.running:
            self.idle.set()
        duration_seconds = self._now() - arrived_at
        values: dict[str, object] = {
            "event": "request",
            "request_id": record.request_id,
            "client": record.client,
            "method": method,
            "path": path,
            "status": status,
            "duration_seconds": round(duration_seconds, 6),
        }
        if record.key is not None:
            values["key"] = record.key.name
        if record.model:
            values["model"] = record.model
        if record.error_code:
            self._count_error(record, status, values)
        if record.retry_reasons or record.is_retry_refused:
            values["retries"] = len(record.retry_reasons)
            tally.record_retries(record.retry_reasons, is_refused=record.is_retry_refused)
        instance, granted_at, first_byte_at = record.instance, record.granted_at, record.first_byte_at
        model = self._model_label(record.model) if instance is not None else ""
        tally.record_response(record.route, model, status)
        tokens: Tokens | None = None
        if instance is not None and granted_at is not None:
            queue_seconds = granted_at - arrived_at
            values["instance"] = instance
            values["queue_seconds"] = round(queue_seconds, 6)
            tally.record_served(model, queue_seconds, duration_seconds)
            tokens = _UNKNOWN
            if first_byte_at is not None:
                tokens = self._record_output(record, model, instance, first_byte_at, values)
            if self._usage is not None:
                self._usage(_finished(record, instance, granted_at, arrived_at + duration_seconds, tokens))
        level = "info" if status < 500 else "warning"
        if record.route in _PROBES and status in _PROBE_RESULTS:
            level = "debug"  # a probe with an ordinary result
        self._write(level, values)
        if record.key is not None:
            self._count_for_key(record, record.key.name, status, tokens)
        if duration_seconds >= self._slow_seconds:
            self._log_slow(record, duration_seconds)

    def _record_output(
        self,
        record: RequestRecord,
        model: str,
        instance: InstanceName,
        first_byte_at: float,
        values: dict[str, object],
    ) -> Tokens:
        """Records a response that had a first byte, in the metrics and in the line's `values`."""
        time_to_first_token_seconds = first_byte_at - record.arrived_at
        tokens = tokens_of(record.tail)
        self._tally.record_output(model, instance, time_to_first_token_seconds, tokens.prompt, tokens.output)
        values["time_to_first_token_seconds"] = round(time_to_first_token_seconds, 6)
        values["bytes"] = record.bytes_out
        if tokens.prompt is not None:
            values["prompt_tokens"] = tokens.prompt
        if tokens.output is not None:
            values["output_tokens"] = tokens.output
        streamed_seconds = (record.last_byte_at or 0.0) - first_byte_at
        if record.chunks > 1 and streamed_seconds > 0:
            values["chunks_per_second"] = round((record.chunks - 1) / streamed_seconds, 1)
            self._tally.record_streamed(model, streamed_seconds, _output_tokens(record, tokens))
        return tokens

    def _count_for_key(self, record: RequestRecord, key: str, status: int, tokens: Tokens | None) -> None:
        """Charges what the answer reports. A request that failed costs nothing; one that was cut off, what it got."""
        prompt, output = 0, 0
        if record.first_byte_at is not None and (status < _ERROR_STATUS or status == CLIENT_GONE):
            reported = tokens or tokens_of(record.tail)
            prompt, output = reported.prompt, _output_tokens(record, reported)
        self._tally.record_key(key, status, prompt or 0, output)
        if record.charge is not None:
            record.charge.settle(prompt, output)

    def _count_error(self, record: RequestRecord, status: int, values: dict[str, object]) -> None:
        values["error"] = record.error_code
        (self._rejections if status >= _ERROR_STATUS else self._stream_errors).labels(record.error_code).inc()
        if record.refusal:
            values["refused"] = record.refusal

    def _log_slow(self, record: RequestRecord, duration_seconds: float) -> None:
        phases = self._slow.phases(record, duration_seconds) if self._slow is not None else None
        if phases is None:
            return
        values: dict[str, object] = {
            "event": "slow_request",
            "request_id": record.request_id,
            "client": record.client,
            "model": record.model,
            "duration_seconds": round(duration_seconds, 6),
            **phases,
        }
        if record.instance is not None:
            values["instance"] = record.instance
        self._write("warning", values)


def _output_tokens(record: RequestRecord, tokens: Tokens) -> int:
    """As the server counts them; if it does not say, a chunk is about a token."""
    return record.chunks if tokens.output is None else tokens.output


def _finished(
    record: RequestRecord, instance: InstanceName, granted_at: float, ended_at: float, tokens: Tokens
) -> FinishedRequest:
    output = _output_tokens(record, tokens)
    return FinishedRequest(record.client, record.model, instance, granted_at, ended_at, tokens.prompt or 0, output)
