"""Logs and counts the scheduler's decisions and their outcomes, from the controller's events and actions."""

from __future__ import annotations

import logging

import structlog

from router.domain.actions import (
    AbortLoad,
    Action,
    Grant,
    Load,
    Notice,
    ReadGpus,
    Reject,
    Remember,
    RestartInstance,
    StartInstance,
    StopInstance,
    Unload,
)
from router.domain.events import Arrived, Event, GpusRead, LoadFailed, LoadFinished, Released, UnloadFinished
from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.model import BlobDigest
from router.domain.residency import ResidencyKey, is_spill
from router.observability.metrics import Metrics
from router.observability.slow_requests import LoadTimes


class DecisionLog:
    """Observes the controller; `metrics` counts what is logged here."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.load_times = LoadTimes()
        self._gpu_errors: dict[GpuUuid, str] = {}
        self._loads_in_progress: dict[LoadId, tuple[Load, float]] = {}
        """Each load with the time at which it started."""
        self._unloading: dict[ResidencyKey, str] = {}
        """The label of each model that is being unloaded."""
        self._spilled: set[BlobDigest] = set()
        """Models whose last finished load spilled."""
        self._log = structlog.get_logger("router.decisions")
        self._logs_grants: bool = self._log.is_enabled_for(logging.DEBUG)

    def observe(self, event: Event, actions: list[Action], now: float) -> None:
        """Logs one event and the actions that followed from it. Skips arrivals and releases, which are too many."""
        if not isinstance(event, Arrived | Released):
            self._log_event(event, now)
        for action in actions:
            if self._logs_grants or not isinstance(action, Grant):
                self._log_action(action, now)

    def _log_event(self, event: Event, now: float) -> None:
        match event:
            case LoadFinished() | LoadFailed():
                self._log_load_end(event, now)
            case UnloadFinished(error=str() as error):
                model = self._unloading.get((event.instance, event.blob), "")
                self._metrics.unload_failures.labels(model, event.instance).inc()
                self._log.error("unload_failed", instance=event.instance, blob=event.blob, error=error)
            case UnloadFinished():
                self._unloading.pop((event.instance, event.blob), None)
            case GpusRead():
                self._log_gpu_errors(event)
            case _:
                pass

    def _log_action(self, action: Action, now: float) -> None:
        match action:
            case Grant():
                self._log.debug("granted", ticket=action.ticket_id, instance=action.instance, reason=action.reason)
            case StartInstance():
                self._log.info("start_instance", instance=action.spec.name, reason=action.reason)
            case StopInstance():
                self._log.info("stop_instance", instance=action.instance, reason=action.reason)
            case RestartInstance():
                self._log.warning("restart_instance", instance=action.instance, reason=action.reason)
            case Notice():
                self._log_notice(action)
            case Remember():
                found = action.footprint
                source = "server" if found.parts else "gpus"
                self._log.info(
                    "footprint_measured", blob=found.key.blob, per_gpu_bytes=found.per_gpu_bytes, source=source
                )
            case ReadGpus():
                pass
            case AbortLoad():
                self._log_broken_off(action, now)
            case Load():
                self._loads_in_progress[action.load_id] = (action, now)
                model = self._metrics.model_label(action.model.name)
                self._metrics.begin_load(model, action.instance)
                if action.evicted:
                    self._metrics.swaps.labels(model).inc()
                self._log.info("load", model=action.model.name, instance=action.instance, reason=action.reason)
            case Unload():
                model = self._metrics.model_label(action.model.name)
                self._unloading[action.instance, action.blob] = model
                self._metrics.unloads.labels(model, action.instance, action.cause.value).inc()
                self._metrics.unload_failures.labels(model, action.instance)
                self._log.info("unload", model=action.model.name, instance=action.instance, reason=action.reason)
            case Reject():
                self._log.warning("rejected", ticket=action.ticket_id, code=action.code, message=action.message)

    def _log_notice(self, notice: Notice) -> None:
        self._log.warning(notice.event, **notice.fields)
        if notice.event == "ejected":
            model = self._metrics.model_label(str(notice.fields["model"]))
            self._metrics.ejections.labels(notice.fields["instance"], model, notice.fields["cause"]).inc()

    def _log_broken_off(self, action: AbortLoad, now: float) -> None:
        load, started_at = self._loads_in_progress.pop(action.load_id, (None, now))
        if load is not None:
            self._metrics.loads.labels(self._metrics.model_label(load.model.name), load.instance, "broken_off").inc()
            values = {"model": load.model.name, "instance": load.instance, "reason": action.reason}
            self._log.info("load_broken_off", **values, duration_seconds=round(now - started_at, 3))

    def _log_load_end(self, event: LoadFinished | LoadFailed, now: float) -> None:
        load, started_at = self._loads_in_progress.pop(event.load_id, (None, now))
        if load is None:
            return
        duration_seconds = now - started_at
        model = self._metrics.model_label(load.model.name)
        values = {"model": load.model.name, "instance": load.instance, "duration_seconds": round(duration_seconds, 3)}
        if isinstance(event, LoadFailed):
            self._metrics.loads.labels(model, load.instance, "failed").inc()
            self._log.error("load_failed", **values, status=event.status, error=event.message)
            return
        spilled = load.expects_gpu and is_spill(load.model, event.size_bytes, event.size_vram_bytes)
        self._metrics.loads.labels(model, load.instance, "spilled" if spilled else "loaded").inc()
        self._metrics.load_duration_seconds.labels(model).observe(duration_seconds)
        self._metrics.load_bytes.inc(load.model.weights_bytes)
        self._count_healed(load.model.blob, spilled=spilled)
        self.load_times.record(load.instance, load.model.name, started_at, now)
        write = self._log.error if spilled else self._log.info
        sizes = {"size_bytes": event.size_bytes, "size_vram_bytes": event.size_vram_bytes}
        write("load_spilled" if spilled else "loaded", **values, **sizes)

    def _count_healed(self, blob: BlobDigest, *, spilled: bool) -> None:
        if spilled:
            self._spilled.add(blob)
        elif blob in self._spilled:
            self._spilled.discard(blob)
            self._metrics.spills_healed.inc()

    def _log_gpu_errors(self, event: GpusRead) -> None:
        """Logs each GPU error once, when it appears or changes, and its end."""
        errors = {gpu.uuid: gpu.error for gpu in event.gpus if gpu.error is not None}
        for gpu in event.gpus:
            for code in gpu.xids:
                self._metrics.gpu_xids.labels(gpu.uuid, str(gpu.index), gpu.name, str(code)).inc()
            self._metrics.gpu_errors.labels(gpu.uuid, str(gpu.index), gpu.name)
            if gpu.error is not None and self._gpu_errors.get(gpu.uuid) != gpu.error:
                self._metrics.gpu_errors.labels(gpu.uuid, str(gpu.index), gpu.name).inc()
                self._log.warning("gpu_error", gpu=gpu.uuid, index=gpu.index, error=gpu.error)
            if gpu.error is None and gpu.uuid in self._gpu_errors:
                self._log.info("gpu_back", gpu=gpu.uuid, index=gpu.index)
        self._gpu_errors = errors
