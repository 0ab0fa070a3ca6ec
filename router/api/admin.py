"""The router's own endpoints: health, readiness, metrics, the whole state, explanations, an operator's commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from aiohttp import hdrs, web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from router import __version__
from router.admission.key_ring import KeyStore
from router.api import logs, model_commands, operator_commands, pins
from router.api.attached_models import is_of_attached_engine
from router.api.context import ApiContext
from router.api.explain import explain
from router.api.operator_actions import OperatorActions
from router.api.pins import change_pin, pin_document, pin_documents
from router.api.responses import json_response, text_response
from router.api.why import why
from router.domain.gpu import Gpu
from router.domain.instance import InstanceView
from router.domain.request import Ticket
from router.domain.reservation import Reservation
from router.domain.residency import Residency
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import on_cpu_ratio
from router.domain.vram_ledger import (
    available_bytes,
    external_bytes,
    reserved_bytes,
    resident_bytes,
    unaccounted_bytes,
)
from router.http1.headers import sanitized_request_id
from router.observability.metrics import Metrics
from router.observability.request_history import RequestHistory
from router.observability.request_record import RequestRecord
from router.scheduler.queue.wait_estimate import WaitEstimate

_QUEUE_SHOWN_MAX = 1000
_LASTING = ("uuid", "index", "name", "memory_total_bytes", "error")
"""What is known of a lost GPU."""


class AdminHandler:
    """`emulated`: the title of an emulated rig, "" for real GPUs. `pulls`: the rows of those in progress."""

    def __init__(
        self,
        context: ApiContext,
        metrics: Metrics,
        history: RequestHistory,
        emulated: str,
        pulls: Callable[[], list[dict[str, object]]],
        actions: OperatorActions,
        keys: KeyStore,
    ) -> None:
        self._keys = keys
        self._pulls = pulls
        self._actions = actions
        self._context = context
        self._history = history
        self._metrics = metrics
        self._emulated = emulated

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        extra = record.response_headers()
        match record.route:
            case "/health":
                return text_response("ok\n", extra)
            case "/ready":
                return self._ready(extra, hides_details=record.hides_details)
            case "/metrics":
                headers = {hdrs.CONTENT_TYPE: CONTENT_TYPE_PLAIN_0_0_4, **extra}
                return web.Response(body=generate_latest(self._metrics.registry), headers=headers)
            case operator_commands.DRAIN | operator_commands.RESUME | operator_commands.RESTART:
                answer = await operator_commands.run_command(request, record.route, self._context.controller)
                return json_response(answer, extra)
            case operator_commands.RELOAD:
                return json_response(await self._actions.reload(), extra)
            case pins.PIN | pins.UNPIN:
                body = await operator_commands.command_body(request)
                return json_response(
                    await change_pin(body, record.route, self._context, self._actions.change_pin), extra
                )
            case logs.LOGS:
                return await logs.send_logs(request, self._actions.output, self._context.controller, extra)
            case "/llamayard/explain":
                return json_response(await explain(self._context, request.query), extra)
            case "/llamayard/why":
                return json_response(why(self._context.controller, self._history, request.query), extra)
            case model_commands.LOAD | model_commands.UNLOAD:
                body = await operator_commands.command_body(request)
                return json_response(await model_commands.run_model_command(self._context, body, record), extra)
            case _:
                wanted_id = sanitized_request_id(request.query.get("request_id"))
                return json_response(self._waiting(wanted_id) if wanted_id else self.status(), extra)

    def _ready(self, extra: Mapping[str, str], *, hides_details: bool) -> web.StreamResponse:
        """200 while any instance is ready; 503 before, while draining, and when all are down."""
        names = [view.spec.name for view in self._context.ready_instances()]
        gpus = self._context.controller.snapshot().gpus.values()
        lost = "".join(f"; GPU {gpu.index} is lost: {gpu.error}" for gpu in gpus if gpu.error is not None)
        is_ready = bool(names) and not self._context.controller.is_closing
        if hides_details:
            return text_response("ready\n" if is_ready else "not ready\n", extra, status=200 if is_ready else 503)
        if is_ready:
            return text_response(f"ready: {', '.join(names)}{lost}\n", extra)
        return text_response(f"not ready: no instance is ready{lost}; see /llamayard/status\n", extra, status=503)

    def status(self) -> dict[str, Any]:
        """The document of `/llamayard/status`."""
        snapshot = self._context.controller.snapshot()
        return {
            "version": __version__,
            "emulated": self._emulated,
            "problems": [self._keys.problem] if self._keys.problem else [],
            "gpus": [_gpu(snapshot, gpu) for gpu in sorted(snapshot.gpus.values(), key=lambda g: g.index)],
            "instances": [_instance(snapshot, view) for view in snapshot.instances.values()],
            "models": [_model(snapshot, residency) for residency in snapshot.residencies.values()],
            "reservations": [_reservation(snapshot, each) for each in snapshot.reservations.values()],
            "drained": operator_commands.drained_document(snapshot),
            "restart": operator_commands.restart_document(snapshot),
            "pins": pin_documents(snapshot),
            "warm_missing": [{"model": name, "reason": why} for name, why in snapshot.warm_missing.items()],
            "pulls": self._pulls(),
            **self._waiting(),
        }

    def _waiting(self, request_id: str = "") -> dict[str, Any]:
        """The queue in the order of service; with `request_id` only requests with that id."""
        controller = self._context.controller
        snapshot, tickets = controller.snapshot(), {ticket.id: ticket for ticket, _ in controller.waiting()}
        rows = [(tickets[ticket_id], wait_estimate) for ticket_id, wait_estimate in controller.wait_estimates().items()]
        shown = [row for row in rows if row[0].request_id == request_id] if request_id else rows
        return {
            "queue": {"waiting": len(rows), "limit": snapshot.policy.queue_limit},
            "waiting": [_ticket(snapshot, *row) for row in shown[:_QUEUE_SHOWN_MAX]],
        }


def _gpu(snapshot: Snapshot, gpu: Gpu) -> dict[str, Any]:
    """All readings of the GPU, and its ledger. Of a lost one the last readings are not shown as if they were of now."""
    readings = asdict(gpu)
    if gpu.error is not None:
        readings |= {key: [] if key == "processes" else None for key in readings if key not in _LASTING}
    return {
        **readings,
        "lost": gpu.error is not None,
        "drained": snapshot.drained.has_gpu(gpu.uuid),
        "unfit": snapshot.drained.reason_of(gpu.uuid),
        "hot": gpu.uuid in snapshot.hot,
        "on_probation": gpu.uuid in snapshot.probation,
        "memory_bandwidth_bytes_per_second": gpu.bandwidth_bytes_per_second,
        "resident_bytes": resident_bytes(snapshot, gpu.uuid),
        "reserved_bytes": reserved_bytes(snapshot, gpu.uuid),
        "external_bytes": external_bytes(snapshot, gpu.uuid),
        "unaccounted_bytes": unaccounted_bytes(snapshot, gpu.uuid),
        "available_bytes": max(0, available_bytes(snapshot, gpu.uuid)),
    }


def _instance(snapshot: Snapshot, view: InstanceView) -> dict[str, Any]:
    spec, health = view.spec, snapshot.health.get(view.spec.name)
    return {
        "name": spec.name,
        "state": view.state.value,
        "version": view.version,
        "url": spec.url,
        "gpus": list(spec.gpus),
        "attached": spec.attached,
        "engine": spec.engine,
        "num_parallel": spec.num_parallel,
        "context_length": spec.context_length,
        "kv_cache_type": spec.kv_cache_type,
        "flash_attention": spec.flash_attention,
        "ejected": "" if health is None or snapshot.now >= health.ejected_until else health.reason,
        "reason": view.reason,
    }


def _model(snapshot: Snapshot, residency: Residency) -> dict[str, Any]:
    health = snapshot.health.get((residency.instance, residency.blob))
    ejected_seconds = health.ejected_until - snapshot.now if health is not None else 0.0
    return {
        "name": residency.name,
        "instance": residency.instance,
        "state": residency.state.value,
        "blob": residency.blob,
        "slots": residency.slots,
        "in_flight": residency.in_flight,
        "unload_failures": residency.unload_failures,
        "ejected_seconds": round(max(0.0, ejected_seconds), 1),
        "per_gpu_bytes": list(residency.per_gpu_bytes),
        "context_length": residency.context_length,
        "options": dict(residency.options),
        "size_bytes": residency.size_bytes,
        "size_vram_bytes": residency.size_vram_bytes,
        "cpu_ratio": on_cpu_ratio(snapshot, residency),
        "idle_seconds": round(snapshot.now - residency.used_at, 1) if residency.is_idle else 0.0,
        "expires_in_seconds": None if residency.expires_at is None else round(residency.expires_at - snapshot.now, 1),
        "pin": pin_document(snapshot, residency.name),
        "always_loaded": is_of_attached_engine(residency.model),
        "reason": residency.reason,
    }


def _reservation(snapshot: Snapshot, reservation: Reservation) -> dict[str, Any]:
    return {
        "load_id": reservation.load_id,
        "instance": reservation.instance,
        "blob": reservation.blob,
        "per_gpu_bytes": [size for _, size in reservation.per_gpu_bytes],
        "age_seconds": round(snapshot.now - reservation.made_at, 1),
        "state": "planned" if reservation.sent_at is None else "loading",
    }


def _ticket(snapshot: Snapshot, ticket: Ticket, wait_estimate: WaitEstimate) -> dict[str, Any]:
    wait = wait_estimate.expected_wait_seconds
    return {
        "ticket": ticket.id,
        "client": ticket.client,
        "position": wait_estimate.position,
        "expected_wait_seconds": None if wait is None else round(wait, 1),
        "request_id": ticket.request_id,
        "model": ticket.model.name,
        "waited_seconds": round(snapshot.now - ticket.arrived_at, 1),
        "deadline_in_seconds": round(ticket.deadline - snapshot.now, 1),
        "reason": wait_estimate.reason,
    }
