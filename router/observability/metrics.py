"""Prometheus metrics, named `llamayard_` plus the names that vLLM and OpenTelemetry use.

Durations are in seconds, sizes in bytes, and counters end in `_total`. The number of `model` label values is bounded:
after `_MODEL_NAMES_MAX` names, further models are counted as "other". The same holds for `key`, an access key's name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from router import __version__
from router.domain.gpu import Gpu
from router.domain.instance import InstanceState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import on_cpu_ratio
from router.domain.vram_ledger import external_bytes, reserved_bytes, resident_bytes, unaccounted_bytes
from router.errors import (
    ERROR_CODES,
    RETRY_REASONS,
    InstanceLost,
    ServerRefused,
    ShuttingDown,
    StreamTruncated,
    WaitTimeout,
)

BUCKETS_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""OpenTelemetry's buckets for the time to first token, extended to 160 s for cold loads."""

TOKEN_BUCKETS_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""OpenTelemetry's buckets for the time per output token, extended downwards for small models."""
LAG_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

STREAM_ERROR_CODES = tuple(
    error.code for error in (InstanceLost, ServerRefused, StreamTruncated, WaitTimeout, ShuttingDown)
)
"""What can end a stream after its first byte."""
LOAD_OUTCOMES = ("loaded", "failed", "spilled", "broken_off")
_MODEL_NAMES_MAX = 1000
_KEY_NAMES_MAX = 1000
_GPU_LABELS = ("gpu", "index", "name")


class ModelLabels:
    """Maps model names to values of the label `model`, of which there are at most `_MODEL_NAMES_MAX` and "other"."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._names or len(self._names) < _MODEL_NAMES_MAX:
            self._names.add(name)
            return name
        return "other"


class Metrics:
    """All metrics of one router, in a registry of its own.

    Counters are exported as 0 as soon as their labels are known: `increase()` does not see the first event of a series
    that begins at 1.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.model_label = ModelLabels()
        self.requests = RequestMetrics()
        registry.register(self.requests)
        self.loads = Counter(
            "llamayard_loads", "Finished loads, by outcome.", ("model", "instance", "outcome"), registry=registry
        )
        self.load_duration_seconds = Histogram(
            "llamayard_load_duration_seconds",
            "Duration of successful loads.",
            ("model",),
            buckets=BUCKETS_SECONDS,
            registry=registry,
        )
        self.load_bytes = Counter("llamayard_load_bytes", "Bytes of model weights loaded.", registry=registry)
        self.unloads = Counter(
            "llamayard_unloads", "Models unloaded, by cause.", ("model", "instance", "cause"), registry=registry
        )
        self.swaps = Counter(
            "llamayard_swaps", "Loads for which other models were unloaded.", ("model",), registry=registry
        )
        self.spills_healed = Counter(
            "llamayard_spills_healed", "Models that were loaded whole after a load that spilled.", registry=registry
        )
        self.gpu_errors = Counter(
            "llamayard_gpu_errors", "Errors of a GPU, each counted when it appears.", _GPU_LABELS, registry=registry
        )
        self.unload_failures = Counter(
            "llamayard_unload_failures",
            "Unloads that failed; after two in a row the server is restarted.",
            ("model", "instance"),
            registry=registry,
        )
        self.gpu_xids = Counter(
            "llamayard_gpu_xid_errors", "XID errors that the driver reported.", (*_GPU_LABELS, "xid"), registry=registry
        )
        self.ejections = Counter(
            "llamayard_ejections",
            "Replicas and instances that took no new request for a while, because they failed requests.",
            ("instance", "model", "reason"),
            registry=registry,
        )
        self.rejections = Counter("llamayard_rejections", "Requests rejected, by code.", ("code",), registry=registry)
        for code in ERROR_CODES:
            self.rejections.labels(code)
        self.stream_errors = Counter(
            "llamayard_stream_errors", "Streams that ended with an error, by code.", ("code",), registry=registry
        )
        for code in STREAM_ERROR_CODES:
            self.stream_errors.labels(code)
        build = Gauge("llamayard_build_info", "Always 1; the router's version.", ("version",), registry=registry)
        build.labels(__version__).set(1)
        self.loop_lag = LoopLag()
        registry.register(self.loop_lag)
        PlatformCollector(registry)
        ProcessCollector(registry=registry)

    def begin_load(self, model: str, instance: str) -> None:
        """Exports the outcomes that a load can have, before it has one. `model` is a value of `model_label`."""
        for outcome in LOAD_OUTCOMES:
            self.loads.labels(model, instance, outcome)
        self.swaps.labels(model)


class _Histogram:
    """Counts per bucket (the last one is +Inf), and the sum of all values. `bounds`: upper bounds of the others."""

    __slots__ = ("bounds", "counts", "sum_seconds")

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_seconds = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_seconds += seconds

    def cumulative_buckets(self) -> list[tuple[str, float]]:
        """Upper bound and cumulative count of each bucket, as the exposition format requires."""
        bounds = (*map(str, self.bounds), "+Inf")
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class LoopLag(Collector):
    """How much later than due the event loop ran a timer: while it is busy, every request waits that long."""

    def __init__(self) -> None:
        self._histogram = _Histogram(LAG_BUCKETS_SECONDS)

    def observe(self, seconds: float) -> None:
        self._histogram.observe(max(0.0, seconds))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily("llamayard_event_loop_lag_seconds", "Lateness of a timer of the event loop.")
        family.add_metric((), self._histogram.cumulative_buckets(), self._histogram.sum_seconds)
        yield family


class _ModelHistograms:
    """The histograms of one model's requests."""

    __slots__ = (
        "duration_seconds", "queue_time_seconds", "time_per_output_token_seconds", "time_to_first_token_seconds"
    )  # fmt: skip

    def __init__(self) -> None:
        self.queue_time_seconds = _Histogram()
        self.time_to_first_token_seconds = _Histogram()
        self.time_per_output_token_seconds = _Histogram(TOKEN_BUCKETS_SECONDS)
        self.duration_seconds = _Histogram()


_REQUEST_HISTOGRAMS: tuple[tuple[str, str, Callable[[_ModelHistograms], _Histogram]], ...] = (
    (
        "llamayard_time_to_first_token_seconds",
        "Time from arrival to the first byte of the response.",
        attrgetter("time_to_first_token_seconds"),
    ),
    (
        "llamayard_request_time_per_output_token_seconds",
        "Mean time between two tokens of a streamed response: its inter-token latency.",
        attrgetter("time_per_output_token_seconds"),
    ),
    (
        "llamayard_request_duration_seconds",
        "Time from arrival to the last byte of the response.",
        attrgetter("duration_seconds"),
    ),
    (
        "llamayard_request_queue_time_seconds",
        "Time from arrival until a slot was granted.",
        attrgetter("queue_time_seconds"),
    ),
)
"""Metric name, help text, and where to find the histogram."""


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """Sums over all models since the start."""

    running: int
    """Requests in progress now, of any kind."""
    output_tokens: int
    ttft_counts: tuple[int, ...]
    """Responses by time to first token, in the buckets of `BUCKETS_SECONDS`; the last count is of longer ones."""


class _KeyCounts:
    """What requests with one access key came to."""

    __slots__ = ("output_tokens", "prompt_tokens", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.prompt_tokens = self.output_tokens = 0


class RequestMetrics(Collector):
    """Per-request counts, kept as plain numbers and turned into metrics only when scraped.

    The client library's counters take a lock and look up labels on every increment, which at full load would be a
    fifth of the time spent on a request.
    """

    def __init__(self) -> None:
        self.running = 0
        self._responses: dict[tuple[str, str, str], int] = {}
        """By route, model and status."""
        self._tokens: dict[tuple[str, str, str], int] = {}
        """By model, instance and token type."""
        self._retries = dict.fromkeys(RETRY_REASONS, 0)
        """By reason."""
        self._histograms: dict[str, _ModelHistograms] = {}
        """By model."""
        self._keys: dict[str, _KeyCounts] = {}
        """By the name of the access key."""
        self._retries_refused = 0

    def record_response(self, route: str, model: str, status: int) -> None:
        """Counts a request that was answered, by a server or by the router itself."""
        key = (route, model, str(status))
        self._responses[key] = self._responses.get(key, 0) + 1

    def record_served(self, model: str, queue_time_seconds: float, duration_seconds: float) -> None:
        """Records the times of a request that was granted a slot."""
        histograms = self._histograms.get(model) or self._histograms.setdefault(model, _ModelHistograms())
        histograms.queue_time_seconds.observe(queue_time_seconds)
        histograms.duration_seconds.observe(duration_seconds)

    def record_output(
        self,
        model: str,
        instance: str,
        time_to_first_token_seconds: float,
        prompt_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        """Records a response that had a first byte. Call `record_served` first. Token counts are None if unknown."""
        self._histograms[model].time_to_first_token_seconds.observe(time_to_first_token_seconds)
        if prompt_tokens is not None:
            self._count_tokens(model, instance, "prompt", prompt_tokens)
        if output_tokens is not None:
            self._count_tokens(model, instance, "generation", output_tokens)

    def record_streamed(self, model: str, streamed_seconds: float, output_tokens: int) -> None:
        """Records a stream of several tokens, from its first to its last byte. Call `record_served` first."""
        if output_tokens > 1:
            self._histograms[model].time_per_output_token_seconds.observe(streamed_seconds / (output_tokens - 1))

    def record_retries(self, reasons: Iterable[str], *, is_refused: bool) -> None:
        """Counts each time that a request was sent again (each is one of `RETRY_REASONS`), and whether the budget
        allowed no further time."""
        for reason in reasons:
            self._retries[reason] += 1
        self._retries_refused += is_refused

    def _count_tokens(self, model: str, instance: str, kind: str, count: int) -> None:
        key = (model, instance, kind)
        self._tokens[key] = self._tokens.get(key, 0) + count

    def record_key(self, key: str, status: int, prompt_tokens: int, output_tokens: int) -> None:
        """Counts a request with an access key, and the tokens that it is charged."""
        counts = self._keys.get(key)
        if counts is None:
            label = key if len(self._keys) < _KEY_NAMES_MAX else "other"
            counts = self._keys.setdefault(label, _KeyCounts())
        counts.statuses[status] = counts.statuses.get(status, 0) + 1
        counts.prompt_tokens += prompt_tokens
        counts.output_tokens += output_tokens

    def totals(self) -> RequestTotals:
        counts = [0] * (len(BUCKETS_SECONDS) + 1)
        for histograms in self._histograms.values():
            for index, count in enumerate(histograms.time_to_first_token_seconds.counts):
                counts[index] += count
        tokens = sum(count for (_, _, kind), count in self._tokens.items() if kind == "generation")
        return RequestTotals(self.running, tokens, tuple(counts))

    def _key_families(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "llamayard_key_requests", "Requests with an access key.", labels=("key", "status")
        )
        tokens = CounterMetricFamily("llamayard_key_tokens", "Tokens charged to access keys.", labels=("key", "type"))
        for key, counts in self._keys.items():
            for status, count in counts.statuses.items():
                requests.add_metric((key, str(status)), float(count))
            tokens.add_metric((key, "prompt"), float(counts.prompt_tokens))
            tokens.add_metric((key, "generation"), float(counts.output_tokens))
        yield requests
        yield tokens

    def collect(self) -> Iterable[Metric]:
        yield from self._key_families()
        responses = CounterMetricFamily("llamayard_requests", "Requests answered.", labels=("route", "model", "status"))
        for labels, count in self._responses.items():
            responses.add_metric(labels, float(count))
        yield responses
        yield GaugeMetricFamily("llamayard_requests_running", "Requests in progress.", float(self.running))
        retries = CounterMetricFamily("llamayard_retries", "Requests sent again, by reason.", labels=("reason",))
        for reason, count in self._retries.items():
            retries.add_metric((reason,), float(count))
        yield retries
        yield CounterMetricFamily(
            "llamayard_retries_refused", "Requests not sent again because of the budget.", float(self._retries_refused)
        )
        tokens = CounterMetricFamily(
            "llamayard_tokens", "Tokens, as counted by the servers.", labels=("model", "instance", "type")
        )
        for labels, count in self._tokens.items():
            tokens.add_metric(labels, float(count))
        yield tokens
        for name, help_text, histogram_of in _REQUEST_HISTOGRAMS:
            family = HistogramMetricFamily(name, help_text, labels=("model",))
            for model, histograms in self._histograms.items():
                histogram = histogram_of(histograms)
                family.add_metric((model,), histogram.cumulative_buckets(), histogram.sum_seconds)
            yield family


class FleetMetricsCollector(Collector):
    """Gauges of GPUs, instances, loaded models and the queue, read from a snapshot at each scrape."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        waiting_count: Callable[[], int],
        fair_share_spread: Callable[[], float],
    ) -> None:
        self._snapshot = snapshot
        self._waiting_count = waiting_count
        self._fair_share_spread = fair_share_spread

    def collect(self) -> Iterable[GaugeMetricFamily]:
        snapshot = self._snapshot()
        yield GaugeMetricFamily("llamayard_requests_waiting", "Requests waiting for a slot.", self._waiting_count())
        yield GaugeMetricFamily(
            "llamayard_fair_share_spread_tokens",
            "Most minus fewest weighted tokens that waiting clients have received; 0 while fewer than two wait.",
            self._fair_share_spread(),
        )
        yield from _gpu_flag_families(snapshot)
        yield from _gpu_families(snapshot)
        yield from _vram_ledger_families(snapshot)
        states = GaugeMetricFamily(
            "llamayard_instance_state", "1 for the current state of the instance, else 0.", labels=("instance", "state")
        )
        for view in snapshot.instances.values():
            for state in InstanceState:
                states.add_metric((view.spec.name, state.value), float(view.state is state))
        yield states
        yield _instance_info_family(snapshot)
        missing = GaugeMetricFamily(
            "llamayard_warm_models_missing", "1 while a model with keep_warm is not loaded, else 0.", labels=("model",)
        )
        for name, pin in snapshot.policy.pins.items():
            if pin.keep_warm:
                missing.add_metric((name,), float(name in snapshot.warm_missing))
        yield missing
        slots_used = GaugeMetricFamily(
            "llamayard_model_slots_used", "Slots in use, for each loaded model.", labels=("model", "instance")
        )
        for residency in snapshot.residencies.values():
            slots_used.add_metric((residency.name, residency.instance), float(residency.in_flight))
        yield slots_used
        yield _on_cpu_family(snapshot)


_GPU_GAUGES: dict[str, tuple[str, Callable[[Gpu], float | None]]] = {
    "memory_total_bytes": ("Total GPU memory.", lambda gpu: gpu.memory_total_bytes),
    "memory_used_bytes": ("GPU memory in use by any process.", lambda gpu: gpu.memory_used_bytes),
    "memory_free_bytes": ("Free GPU memory, as reported by the driver.", lambda gpu: gpu.memory_free_bytes),
    "utilization_ratio": ("GPU utilization over the driver's last sample period.", lambda gpu: gpu.utilization_ratio),
    "temperature_celsius": ("GPU temperature.", lambda gpu: gpu.temperature_celsius),
    "power_draw_watts": ("GPU power draw.", lambda gpu: gpu.power_draw_watts),
    "power_limit_watts": ("GPU power limit.", lambda gpu: gpu.power_limit_watts),
}
"""Help text and value by the metric name after `llamayard_gpu_`. A value of None is left out."""

_VRAM_LEDGER_GAUGES = {
    "resident": ("GPU memory held by loaded models, as accounted by the router.", resident_bytes),
    "reserved": ("GPU memory reserved for loads in progress.", reserved_bytes),
    "external": ("GPU memory in use by other programs.", external_bytes),
    "unaccounted": ("GPU memory accounted to loaded models that the driver does not show as used.", unaccounted_bytes),
}
"""Help text and value by the middle of the metric name, `llamayard_gpu_memory_..._bytes`."""


def _gpu_labels(gpu: Gpu) -> tuple[str, str, str]:
    return gpu.uuid, str(gpu.index), gpu.name


def _gpu_flag_family(
    snapshot: Snapshot, name: str, documentation: str, is_on: Callable[[Gpu], bool]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=_GPU_LABELS)
    for gpu in snapshot.gpus.values():
        family.add_metric(_gpu_labels(gpu), float(is_on(gpu)))
    return family


def _gpu_flag_families(snapshot: Snapshot) -> Iterator[GaugeMetricFamily]:
    lost = "1 while the GPU cannot be read, else 0; its other metrics are then left out."
    yield _gpu_flag_family(snapshot, "llamayard_gpu_lost", lost, lambda gpu: gpu.error is not None)
    drained = "1 while an operator has drained the GPU, else 0."
    yield _gpu_flag_family(snapshot, "llamayard_gpu_drained", drained, lambda gpu: snapshot.drained.has_gpu(gpu.uuid))
    unfit = "1 while the router has drained the GPU because it fails or is too hot, else 0."
    yield _gpu_flag_family(
        snapshot, "llamayard_gpu_unfit", unfit, lambda gpu: bool(snapshot.drained.reason_of(gpu.uuid))
    )


def _on_cpu_family(snapshot: Snapshot) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "llamayard_model_cpu_ratio", "Share of a loaded model that is on the CPU although its instance has GPUs.",
        labels=("model", "instance"),
    )  # fmt: skip
    for residency in snapshot.residencies.values():
        ratio = on_cpu_ratio(snapshot, residency)
        if ratio is not None:
            family.add_metric((residency.name, residency.instance), ratio)
    return family


def _instance_info_family(snapshot: Snapshot) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "llamayard_instance_info", "Always 1; the engine and version of the instance's server.",
        labels=("instance", "engine", "version"),
    )  # fmt: skip
    for view in snapshot.instances.values():
        family.add_metric((view.spec.name, view.spec.engine, view.version or ""), 1.0)
    return family


def _readable(snapshot: Snapshot) -> Iterable[Gpu]:
    """GPUs whose figures are those of now."""
    return (gpu for gpu in snapshot.gpus.values() if gpu.error is None)


def _gpu_families(snapshot: Snapshot) -> Iterable[GaugeMetricFamily]:
    for name, (help_text, read_value) in _GPU_GAUGES.items():
        family = GaugeMetricFamily(f"llamayard_gpu_{name}", help_text, labels=_GPU_LABELS)
        for gpu in _readable(snapshot):
            value = read_value(gpu)
            if value is not None:
                family.add_metric(_gpu_labels(gpu), float(value))
        yield family


def _vram_ledger_families(snapshot: Snapshot) -> Iterable[GaugeMetricFamily]:
    for name, (help_text, count_bytes) in _VRAM_LEDGER_GAUGES.items():
        family = GaugeMetricFamily(f"llamayard_gpu_memory_{name}_bytes", help_text, labels=_GPU_LABELS)
        for gpu in _readable(snapshot):
            family.add_metric(_gpu_labels(gpu), float(count_bytes(snapshot, gpu.uuid)))
        yield family
