"""What operators see: Prometheus metrics and the log lines of decisions, fed with the engine's events and actions.

Names are `llamayard_` and the field's own (vLLM's, OpenTelemetry's): durations in seconds, sizes in bytes, counters end
in `_total`. Labels are bounded: after so many names of models further ones count as "other". It decides nothing.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import attrgetter

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from router.domain.actions import (
    Action,
    Grant,
    Load,
    ReadGpus,
    Reject,
    Remember,
    StartInstance,
    StopInstance,
    Unload,
)
from router.domain.events import Arrived, Event, GpusRead, LoadFailed, LoadFinished, Released, UnloadFinished
from router.domain.gpu import Gpu, GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceState
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import external_bytes, reserved_bytes, resident_bytes, unaccounted_bytes

BUCKETS_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""OpenTelemetry's for the time to the first token, and up to 160 s for cold loads."""

_MODEL_NAMES_MAX = 1000


class ModelLabels:
    """Bounds the values of the label `model`."""

    def __init__(self, most: int = _MODEL_NAMES_MAX) -> None:
        self._most = most
        self._seen: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._seen or len(self._seen) < self._most:
            self._seen.add(name)
            return name
        return "other"


class Metrics:
    """All metrics of one router, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.model_label = ModelLabels()
        self.requests = RequestTally()
        registry.register(self.requests)
        self.loads = Counter(
            "llamayard_loads", "Loads ended, by outcome.", ("model", "instance", "outcome"), registry=registry
        )
        self.load_seconds = Histogram(
            "llamayard_load_duration_seconds",
            "Loads that ended well.",
            ("model",),
            buckets=BUCKETS_SECONDS,
            registry=registry,
        )
        self.load_bytes = Counter("llamayard_load_bytes", "Weights loaded.", registry=registry)
        self.unloads = Counter("llamayard_unloads", "Models unloaded.", ("model", "instance"), registry=registry)
        self.rejections = Counter("llamayard_rejections", "Requests rejected, by code.", ("code",), registry=registry)
        PlatformCollector(registry)
        ProcessCollector(registry=registry)


class _Histogram:
    """Counts by bucket, and their sum."""

    __slots__ = ("counts", "sum_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self.sum_seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the exposition format has them."""
        bounds = (*map(str, BUCKETS_SECONDS), "+Inf")
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class _Times:
    """Of one model's requests."""

    __slots__ = ("durations", "firsts", "waits")

    def __init__(self) -> None:
        self.waits = _Histogram()
        self.firsts = _Histogram()
        self.durations = _Histogram()


class RequestTally(Collector):
    """What is counted for every request: plain numbers, which become metrics only when somebody asks for them.

    The library's own counters take a lock and look up labels each time, which at full load is a fifth of a request.
    """

    def __init__(self) -> None:
        self.running = 0
        self._answered: dict[tuple[str, str, str], int] = {}
        self._tokens: dict[tuple[str, str], int] = {}
        self._times: dict[str, _Times] = {}
        """By model."""

    def answered(self, route: str, model: str, status: int) -> None:
        key = (route, model, str(status))
        self._answered[key] = self._answered.get(key, 0) + 1

    def served(self, model: str, waited_seconds: float, duration_seconds: float) -> None:
        """A request that had a slot."""
        times = self._times.get(model) or self._times.setdefault(model, _Times())
        times.waits.add(waited_seconds)
        times.durations.add(duration_seconds)

    def streamed(self, model: str, first_seconds: float, prompt: int | None, output: int | None) -> None:
        """Its answer had a first byte, and perhaps told of tokens. It is `served` already."""
        self._times[model].firsts.add(first_seconds)
        if prompt is not None:
            self._count(model, "prompt", prompt)
        if output is not None:
            self._count(model, "generation", output)

    def _count(self, model: str, kind: str, tokens: int) -> None:
        self._tokens[model, kind] = self._tokens.get((model, kind), 0) + tokens

    def collect(self) -> Iterable[Metric]:
        answered = CounterMetricFamily("llamayard_requests", "Requests answered.", labels=("route", "model", "status"))
        for labels, count in self._answered.items():
            answered.add_metric(labels, float(count))
        yield answered
        yield GaugeMetricFamily("llamayard_requests_running", "Requests being answered.", float(self.running))
        tokens = CounterMetricFamily("llamayard_tokens", "Tokens, as the servers count them.", labels=("model", "type"))
        for labels, count in self._tokens.items():
            tokens.add_metric(labels, float(count))
        yield tokens
        for name, words, of in (
            ("time_to_first_token_seconds", "Arrival to the first byte.", attrgetter("firsts")),
            ("request_duration_seconds", "Arrival to the last byte.", attrgetter("durations")),
            ("request_queue_time_seconds", "Arrival to the granted slot.", attrgetter("waits")),
        ):
            family = HistogramMetricFamily(f"llamayard_{name}", words, labels=("model",))
            for model, times in self._times.items():
                histogram: _Histogram = of(times)
                family.add_metric((model,), histogram.buckets(), histogram.sum_seconds)
            yield family


class FleetCollector(Collector):
    """GPUs, instances and queue, read from a snapshot when they are asked for."""

    def __init__(self, snapshot: Callable[[], Snapshot], waiting: Callable[[], int]) -> None:
        self._snapshot = snapshot
        self._waiting = waiting

    def collect(self) -> Iterable[GaugeMetricFamily]:
        snapshot = self._snapshot()
        yield GaugeMetricFamily("llamayard_requests_waiting", "Requests that wait for a slot.", self._waiting())
        yield from _gpu_families(snapshot)
        states = GaugeMetricFamily(
            "llamayard_instance_state", "1 for the state that the instance is in.", labels=("instance", "state")
        )
        for view in snapshot.instances.values():
            for state in InstanceState:
                states.add_metric((view.spec.name, state.value), float(view.state is state))
        yield states
        loaded = GaugeMetricFamily(
            "llamayard_model_slots_used", "Slots in use of each loaded model.", labels=("model", "instance")
        )
        for residency in snapshot.residencies.values():
            loaded.add_metric((residency.name, residency.instance), float(residency.in_flight))
        yield loaded


_GPU_FIGURES: dict[str, tuple[str, Callable[[Gpu], float | None]]] = {
    "memory_total_bytes": ("Memory of the GPU.", lambda gpu: gpu.memory_total_bytes),
    "memory_used_bytes": ("Memory in use, by anybody.", lambda gpu: gpu.memory_used_bytes),
    "memory_free_bytes": ("Memory free, as the driver says.", lambda gpu: gpu.memory_free_bytes),
    "utilization_ratio": ("Share of the last period in which the GPU computed.", lambda gpu: gpu.utilization_ratio),
    "temperature_celsius": ("Temperature.", lambda gpu: gpu.temperature_celsius),
    "power_draw_watts": ("Power drawn.", lambda gpu: gpu.power_draw_watts),
    "power_limit_watts": ("Power limit.", lambda gpu: gpu.power_limit_watts),
}


def _gpu_families(snapshot: Snapshot) -> Iterable[GaugeMetricFamily]:
    labels = ("gpu", "index", "name")
    gpus = [(gpu, (gpu.uuid, str(gpu.index), gpu.name)) for gpu in snapshot.gpus.values()]
    for key, (words, figure) in _GPU_FIGURES.items():
        family = GaugeMetricFamily(f"llamayard_gpu_{key}", words, labels=labels)
        for gpu, values in gpus:
            value = figure(gpu)
            if value is not None:
                family.add_metric(values, float(value))
        yield family
    ledger = {
        "resident": ("Held by loaded models, by the router's books.", resident_bytes),
        "reserved": ("Set aside for loads under way.", reserved_bytes),
        "foreign": ("In use by others.", external_bytes),
        "drift": ("In the router's books and not in use, as the driver says.", unaccounted_bytes),
    }
    for key, (words, count) in ledger.items():
        family = GaugeMetricFamily(f"llamayard_gpu_memory_{key}_bytes", words, labels=labels)
        for gpu, values in gpus:
            family.add_metric(values, float(count(snapshot, gpu.uuid)))
        yield family


class DecisionLog:
    """Counts and logs what the engine does."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gpu_errors: dict[GpuUuid, str] = {}
        self._under_way: dict[LoadId, tuple[Load, float]] = {}
        self._log = structlog.get_logger("router.decisions")
        self._tells_grants: bool = self._log.is_enabled_for(logging.DEBUG)

    def observe(self, event: Event, actions: list[Action], now: float) -> None:
        if not isinstance(event, Arrived | Released):
            self._tell(event, now)
        for action in actions:
            if self._tells_grants or not isinstance(action, Grant):
                self._action(action, now)

    def _tell(self, event: Event, now: float) -> None:
        match event:
            case LoadFinished() | LoadFailed():
                self._load_ended(event, now)
            case UnloadFinished(error=str() as error):
                self._log.error("unload_failed", instance=event.instance, blob=event.blob, error=error)
            case GpusRead():
                self._tell_lost(event)
            case _:
                pass

    def _action(self, action: Action, now: float) -> None:
        match action:
            case Grant():
                self._log.debug("granted", ticket=action.ticket_id, instance=action.instance, reason=action.reason)
            case StartInstance():
                self._log.info("start_instance", instance=action.spec.name, reason=action.reason)
            case StopInstance():
                self._log.info("stop_instance", instance=action.instance, reason=action.reason)
            case Remember():
                self._log.info("footprint_measured", blob=action.key.blob, per_gpu_bytes=action.per_gpu_bytes)
            case ReadGpus():
                pass
            case Load():
                self._under_way[action.load_id] = (action, now)
                self._log.info("load", model=action.model.name, instance=action.instance, reason=action.reason)
            case Unload():
                self._metrics.unloads.labels(self._metrics.model_label(action.model.name), action.instance).inc()
                self._log.info("unload", model=action.model.name, instance=action.instance, reason=action.reason)
            case Reject():
                self._metrics.rejections.labels(action.code).inc()
                self._log.warning("rejected", ticket=action.ticket_id, code=action.code, message=action.message)

    def _load_ended(self, event: LoadFinished | LoadFailed, now: float) -> None:
        load, began = self._under_way.pop(event.load_id, (None, now))
        if load is None:
            return
        seconds = now - began
        model = self._metrics.model_label(load.model.name)
        values = {"model": load.model.name, "instance": load.instance, "duration_seconds": round(seconds, 3)}
        if isinstance(event, LoadFailed):
            self._metrics.loads.labels(model, load.instance, "failed").inc()
            self._log.error("load_failed", **values, status=event.status, error=event.message)
            return
        spilled = load.expects_gpu and event.size_vram_bytes < event.size_bytes
        self._metrics.loads.labels(model, load.instance, "spilled" if spilled else "loaded").inc()
        self._metrics.load_seconds.labels(model).observe(seconds)
        self._metrics.load_bytes.inc(load.model.weights_bytes)
        write = self._log.error if spilled else self._log.info
        sizes = {"size_bytes": event.size_bytes, "size_vram_bytes": event.size_vram_bytes}
        write("load_spilled" if spilled else "loaded", **values, **sizes)

    def _tell_lost(self, event: GpusRead) -> None:
        errors = {gpu.uuid: gpu.error for gpu in event.gpus if gpu.error is not None}
        for gpu in event.gpus:
            if gpu.error is not None and self._gpu_errors.get(gpu.uuid) != gpu.error:
                self._log.warning("gpu_error", gpu=gpu.uuid, index=gpu.index, error=gpu.error)
            if gpu.error is None and gpu.uuid in self._gpu_errors:
                self._log.info("gpu_back", gpu=gpu.uuid, index=gpu.index)
        self._gpu_errors = errors
