"""The document that a page of the dashboard shows: the status document by id, and what the status lacks.

Its figures are those of `/llamayard/status`. It has no null, and times instead of durations that grow by themselves, so
that its patches (`merge_patch.py`) are short. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from router.api.dashboard.merge_patch import Document
from router.domain.footprint import GpuFootprint
from router.domain.gpu import Gpu, GpuUuid
from router.domain.ids import LoadId
from router.domain.request import Ticket, TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import gpus_of
from router.domain.vram_ledger import external_bytes, reserved_bytes
from router.observability.last_hour import Point, Span
from router.observability.request_history import Step
from router.observability.running_request import RunningRequest
from router.scheduler.placement.cost import reload_seconds

DECISIONS_SHOWN = 100
WARM_CELSIUS, HOT_CELSIUS = 85, 90
_GPU_KEYS = (
    "index", "name", "memory_total_bytes", "memory_used_bytes", "temperature_celsius", "power_draw_watts",
    "power_limit_watts", "utilization_ratio", "lost", "drained", "external_bytes",
)  # fmt: skip
_MODEL_KEYS = (
    "name", "instance", "state", "slots", "in_flight", "context_length", "options", "size_bytes", "cpu_ratio", "pin",
    "reason", "unload_failures", "per_gpu_bytes",
)  # fmt: skip
_INSTANCE_KEYS = (
    "name", "state", "version", "url", "gpus", "attached", "num_parallel", "context_length", "kv_cache_type", "ejected",
    "reason",
)  # fmt: skip
_Item = TypeVar("_Item", Step, Point, Span)
_Parts = Mapping[ResidencyKey, tuple[GpuFootprint, ...]]
"""What each loaded model holds on each of its GPUs."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the document is made of. `status`: of `/llamayard/status`. `wall_offset`: from the controller's clock to
    seconds since 1970."""

    status: Mapping[str, Any]
    snapshot: Snapshot
    tickets: Mapping[TicketId, Ticket]
    """Those that wait, by the `ticket` of the status's rows."""
    running: Sequence[RunningRequest]
    steps: Sequence[Step]
    points: Sequence[Point]
    spans: Sequence[Span]
    wall_offset: float


class DocumentBuilder:
    """Remembers what is slow to compute: the parts of each loaded model, and rows of the past, which do not change."""

    def __init__(self) -> None:
        self._parts: dict[object, tuple[GpuFootprint, ...]] = {}
        self._rows: dict[object, Document] = {}

    def build(self, facts: Facts) -> Document:
        snapshot, status = facts.snapshot, facts.status
        parts = self._all_parts(snapshot)
        document = {
            "at": round(facts.wall_offset + snapshot.now, 1),
            **{key: status[key] for key in ("version", "emulated", "drained", "queue", "warm_missing")},
            "restart": status["restart"] or {},
            "gpus": {gpu["uuid"]: _gpu(gpu, snapshot, parts) for gpu in status["gpus"]},
            "instances": {row["name"]: _kept(row, _INSTANCE_KEYS) for row in status["instances"]},
            "models": dict(_models(facts, parts)),
            "waiting": dict(_waiting(facts)),
            "running": dict(_running(facts)),
            "pulls": {row["model"]: _kept(row, tuple(row)) for row in status["pulls"]},
        }
        return {**without_nulls(document), **self._past(facts)}

    def _past(self, facts: Facts) -> Document:
        """Decisions, points and spans. A row that was there before is the same object: no patch looks into it."""
        kept: dict[object, Document] = {}

        def row(item: _Item, make: Callable[[Facts, _Item], Document]) -> Document:
            key = facts.wall_offset, item
            found = kept[key] = self._rows.get(key) or without_nulls(make(facts, item))
            return found

        past = {
            "decisions": {_step_id(step): row(step, _step) for step in facts.steps[-DECISIONS_SHOWN:]},
            "points": {f"{_wall(facts, point.at):.0f}": row(point, _point) for point in facts.points},
            "spans": {_span_id(span): row(span, _span) for span in facts.spans},
        }
        self._rows = kept
        return past

    def _all_parts(self, snapshot: Snapshot) -> _Parts:
        """The parts of each loaded model on each of its GPUs, by residency key."""
        kept: dict[object, tuple[GpuFootprint, ...]] = {}
        found: dict[ResidencyKey, tuple[GpuFootprint, ...]] = {}
        for key, residency in snapshot.residencies.items():
            if residency.state in (ResidencyState.READY, ResidencyState.UNLOADING):
                facts = (key, residency.context_length, residency.per_gpu_bytes)
                known = self._parts.get(facts)
                kept[facts] = found[key] = parts_of(snapshot, residency) if known is None else known
        self._parts = kept
        return found


def parts_of(snapshot: Snapshot, residency: Residency) -> tuple[GpuFootprint, ...]:
    """What a loaded model holds on each GPU by part: as estimated, scaled to what it holds in all. Of a model without
    facts everything counts as weights."""
    view, sizes = snapshot.instances.get(residency.instance), residency.per_gpu_bytes
    whole = tuple(GpuFootprint(weights_bytes=size) for size in sizes)
    rules = snapshot.engines.get(residency.model.engine)
    if view is None or rules is None or not residency.model.layers or residency.model.is_opaque:
        return whole
    estimate = rules.estimate_footprint(residency.model, view.spec, residency.context_length, snapshot).gpus
    if len(estimate) != len(sizes):
        return whole
    return tuple(
        _scaled(part, size) if part.total_bytes else full
        for part, size, full in zip(estimate, sizes, whole, strict=True)
    )


def _scaled(part: GpuFootprint, size: int) -> GpuFootprint:
    ratio = size / part.total_bytes
    weights = int((part.weights_bytes + part.projector_bytes) * ratio)
    cache = int((part.kv_cache_bytes + part.recurrent_state_bytes) * ratio)
    return GpuFootprint(weights, cache, compute_buffer_bytes=size - weights - cache)


def _gpu(row: Mapping[str, Any], snapshot: Snapshot, parts: _Parts) -> Document:
    uuid: GpuUuid = row["uuid"]
    here = [
        part
        for key, found in parts.items()
        for gpu, part in zip(gpus_of(snapshot, key[0]), found, strict=False)
        if gpu == uuid
    ]
    gpu = snapshot.gpus[uuid]
    weights = sum(part.weights_bytes for part in here)
    cache = sum(part.kv_cache_bytes for part in here)
    buffers = sum(part.compute_buffer_bytes for part in here)
    reserved, external = reserved_bytes(snapshot, uuid), external_bytes(snapshot, uuid)
    return {
        **_kept(row, _GPU_KEYS),
        "weights_bytes": weights,
        "kv_cache_bytes": cache,
        "buffers_bytes": buffers,
        "reserved_bytes": reserved,
        "free_bytes": max(0, gpu.memory_total_bytes - weights - cache - buffers - reserved - external),
        "alarms": list(alarms(row, gpu)),
    }


def alarms(row: Mapping[str, Any], gpu: Gpu) -> Iterable[Document]:
    """What an operator should know of a GPU, gravest first: `level` error or warning, and `text`."""
    if gpu.error is not None:
        yield _alarm("error", f"lost: {gpu.error}")
        return
    if row["unfit"]:
        yield _alarm("error", f"out of service: {row['unfit']}")
    elif row["drained"]:
        yield _alarm("warning", "drained by an operator")
    celsius = gpu.temperature_celsius
    if celsius is not None and celsius >= WARM_CELSIUS:
        yield _alarm("error" if celsius >= HOT_CELSIUS else "warning", f"{celsius} °C")
    elif row["hot"]:
        yield _alarm("warning", "hot or slowed down: others are preferred")
    if row["on_probation"]:
        yield _alarm("warning", "on probation after an error: one load at a time")
    if gpu.throttle_reasons:
        yield _alarm("warning", f"throttled: {', '.join(gpu.throttle_reasons)}")
    if gpu.ecc_errors_uncorrected:
        yield _alarm("warning", f"{gpu.ecc_errors_uncorrected} uncorrected ECC errors")


def _alarm(level: str, text: str) -> Document:
    return {"level": level, "text": text}


def _models(facts: Facts, parts: _Parts) -> Iterable[tuple[str, Document]]:
    snapshot = facts.snapshot
    started = {
        load_id: reservation.sent_at
        for load_id, reservation in snapshot.reservations.items()
        if reservation.sent_at is not None
    }
    for row, (key, residency) in zip(facts.status["models"], snapshot.residencies.items(), strict=True):
        found = parts.get(key, ())
        yield (
            f"{residency.instance}/{residency.blob}",
            {
                **_kept(row, _MODEL_KEYS),
                "is_ejected": row["ejected_seconds"] > 0,
                "used_at": _seconds(facts, residency.used_at),
                "expires_at": None if residency.expires_at is None else _seconds(facts, residency.expires_at),
                "weights_bytes": sum(part.weights_bytes for part in found),
                "kv_cache_bytes": sum(part.kv_cache_bytes for part in found),
                **_load(facts, residency, started),
            },
        )


def _load(facts: Facts, residency: Residency, started: Mapping[LoadId, float]) -> Document:
    """Of a load in progress: when it was sent, and the seconds that it should take."""
    at = None if residency.load_id is None else started.get(residency.load_id)
    if residency.state is not ResidencyState.LOADING or at is None:
        return {}
    expected = reload_seconds(facts.snapshot, residency.model) if residency.model.layers else None
    return {
        "load_started_at": _seconds(facts, at),
        "load_expected_seconds": None if expected is None else round(expected, 1),
    }


def _waiting(facts: Facts) -> Iterable[tuple[str, Document]]:
    for row in facts.status["waiting"]:
        ticket, wait = facts.tickets[row["ticket"]], row["expected_wait_seconds"]
        yield (
            str(ticket.id),
            {
                "position": row["position"],
                "model": ticket.model.name,
                "client": ticket.client,
                "request_id": ticket.request_id,
                "priority": ticket.priority,
                "arrived_at": _seconds(facts, ticket.arrived_at),
                "deadline_at": _seconds(facts, ticket.deadline),
                "expected_wait_seconds": None if wait is None else round(wait),
                "reason": row["reason"],
            },
        )


def _running(facts: Facts) -> Iterable[tuple[str, Document]]:
    for request in facts.running:
        first = request.first_byte_at
        yield (
            f"{request.request_id}/{request.arrived_at:.6f}",
            {
                "request_id": request.request_id,
                "client": request.client,
                "key": request.key,
                "model": request.model,
                "instance": request.instance,
                "route": request.route,
                "arrived_at": _seconds(facts, request.arrived_at),
                "granted_at": _seconds(facts, request.granted_at),
                "first_byte_at": None if first is None else _seconds(facts, first),
                "tokens": request.chunks,
            },
        )


def _step_id(step: Step) -> str:
    return f"{step.at:.6f}/{step.event}/{step.model}/{step.instance}"


def _step(facts: Facts, step: Step) -> Document:
    return {**asdict(step), "at": _seconds(facts, step.at)}


def _point(facts: Facts, point: Point) -> Document:
    del facts
    return {
        "waiting": point.waiting,
        "running": point.running,
        "tokens_per_second": round(point.tokens_per_second, 1),
        "first_tokens": point.first_tokens,
        "ttft_p50_seconds": _rounded(point.ttft_p50_seconds),
        "ttft_p95_seconds": _rounded(point.ttft_p95_seconds),
        "utilization_ratio": _rounded(point.utilization_ratio),
    }


def _span_id(span: Span) -> str:
    return f"{span.since:.6f}/{span.instance}/{span.model}"


def _span(facts: Facts, span: Span) -> Document:
    return {
        "model": span.model,
        "instance": span.instance,
        "is_loading": span.is_loading,
        "per_gpu_bytes": dict(span.per_gpu_bytes),
        "since": _seconds(facts, span.since),
        "until": None if span.until is None else _seconds(facts, span.until),
    }


def _kept(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys}


def _wall(facts: Facts, at: float) -> float:
    return facts.wall_offset + at


def _seconds(facts: Facts, at: float) -> float:
    return round(_wall(facts, at), 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def without_nulls(value: Any) -> Any:
    """The value without the members of its objects that are null; tuples become lists."""
    if isinstance(value, dict):
        members = cast("dict[Any, Any]", value)
        return {str(key): without_nulls(inner) for key, inner in members.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in cast("Sequence[Any]", value)]
    return value
