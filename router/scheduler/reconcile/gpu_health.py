"""GPUs that fail or are too hot, and what becomes of their instances and models.

- An error of the GPU itself (an XID of that class, a new uncorrectable ECC error) drains it, as an operator would:
  running requests may end, models are loaded elsewhere, and sets of GPUs with it are not used. After a while without
  errors it is used again.
- A GPU that is too hot for long is drained until it has cooled down; one that is hot, or slowed down by heat or by its
  power supply, gets new loads and requests only if no other can take them.
- A GPU that comes back, from a fault or from being lost, is on probation: it takes one load at a time, on it alone,
  until one has succeeded. The smallest model that was requested lately is loaded there for that. Where no known model
  fits on it alone, the load is one over several GPUs.

Programs' errors (other XIDs) are logged: what they end is noticed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from router.domain.actions import Action, Notice
from router.domain.gpu import Gpu, GpuUuid
from router.domain.gpu_faults import (
    COOL_CELSIUS,
    HOT_CELSIUS,
    OVERHEATED_CELSIUS,
    OVERHEATED_SECONDS,
    SLOWING_REASONS,
    XIDS,
    describe_xid,
)
from router.domain.ids import LoadId
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import Layout, LayoutKind
from router.domain.snapshot import Estimate, Snapshot
from router.scheduler.placement.candidates import may_use
from router.scheduler.placement.placement import NoFit, Placed, PlacementRequest, place
from router.scheduler.reconcile import reservations
from router.scheduler.state import FleetState

_FAULT_SECONDS = 300.0
"""A GPU without a new error for this long is tried again; doubled with each fault in a row."""
_FAULT_SECONDS_MAX = 3600.0
_PROBATION_SECONDS = 30.0
"""Without any load a probation ends after this time: perhaps nothing is asked for."""
_DISTURBANCE_SECONDS = 5.0
"""As in `lost_gpus.py`: a GPU that was lost for a shorter time has kept its models."""


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is remembered of one GPU."""

    fault: str = ""
    fault_until: float = float("-inf")
    faults: int = 0
    """In a row."""
    hot_since: float | None = None
    """Since when it is at `OVERHEATED_CELSIUS` or above."""
    is_overheated: bool = False
    is_hot: bool = False
    lost_at: float | None = None
    probation_until: float = float("-inf")
    ecc_errors: int | None = None


def observe(fleet: FleetState, now: float) -> list[Action]:
    """Judges all GPUs by the newest reading."""
    actions: list[Action] = []
    for gpu in fleet.gpus.values():
        before = fleet.gpu_health.get(gpu.uuid, GpuHealth(ecc_errors=gpu.ecc_errors_uncorrected))
        found, notices = _judged(before, gpu, now)
        fleet.gpu_health[gpu.uuid] = found
        actions += notices
    _apply(fleet, now)
    return actions


def load_ended(fleet: FleetState, gpus: tuple[GpuUuid, ...], now: float, *, succeeded: bool) -> list[Action]:
    """A load on these GPUs has ended: it decides about those on probation."""
    actions: list[Action] = []
    for uuid in gpus:
        found, gpu = fleet.gpu_health.get(uuid), fleet.gpus.get(uuid)
        if found is None or gpu is None or now >= found.probation_until:
            continue
        if succeeded:
            fleet.gpu_health[uuid] = replace(found, probation_until=now, faults=0)
            actions.append(Notice("gpu_fit_again", {"gpu": uuid, "index": gpu.index}))
        else:
            fleet.gpu_health[uuid], notice = _faulty(found, gpu, "failed the first load after it was back", now)
            actions.append(notice)
    if actions:
        _apply(fleet, now)
    return actions


def begin_tests(fleet: FleetState, estimate: Estimate, new_load_id: Callable[[], LoadId], now: float) -> list[Action]:
    """Plans the load that shows whether a GPU on probation works: of the smallest model that was requested and that
    fits there without evictions. Where none fits on the GPU alone, a load over a set of GPUs may be the test."""
    if not fleet.probation:
        return []
    snapshot = fleet.snapshot(now)
    in_sets: set[GpuUuid] = set()
    first: tuple[ModelFacts, Placed] | None = None
    for uuid in sorted(snapshot.probation):
        found, is_possible = _first_load(snapshot, estimate, uuid, fleet.models)
        first = first or found
        if not is_possible:
            in_sets.add(uuid)
    fleet.set_tested_in_sets(frozenset(in_sets))
    return reservations.begin(fleet, *first, new_load_id(), now) if first is not None else []


def _first_load(
    snapshot: Snapshot, estimate: Estimate, uuid: GpuUuid, models: Mapping[BlobDigest, ModelFacts]
) -> tuple[tuple[ModelFacts, Placed] | None, bool]:
    """The smallest of the models that fits there now, with its place, and whether any may fit at all."""
    if not may_use(snapshot, (uuid,)):
        return None, uuid not in snapshot.tested_in_sets  # a load is under way there
    is_possible = not models  # the first request may be for a small one
    for model in sorted(models.values(), key=lambda each: (each.weights_bytes, each.blob)):
        found = place(snapshot, estimate, PlacementRequest(model, layout=Layout(LayoutKind.GPU, uuid), price_max=0.0))
        if isinstance(found, Placed) and not found.evict:
            return (model, found), True
        is_possible = is_possible or not isinstance(found, NoFit)
    return None, is_possible


def forgive(fleet: FleetState, uuid: GpuUuid | None, now: float) -> None:
    """An operator resumes the GPU, or all: it is tried again at once, on probation."""
    for each, found in list(fleet.gpu_health.items()):
        if uuid in (None, each) and found.fault:
            fleet.gpu_health[each] = _on_probation(found, now)
    _apply(fleet, now)


def _judged(before: GpuHealth, gpu: Gpu, now: float) -> tuple[GpuHealth, list[Action]]:
    found, actions = before, list[Action]()
    for code in gpu.xids:
        known = XIDS.get(code)
        if known is not None and known.is_of_gpu:
            found, notice = _faulty(found, gpu, f"reported {describe_xid(code)}", now)
            actions.append(notice)
        else:
            actions.append(Notice("gpu_xid", {"gpu": gpu.uuid, "index": gpu.index, "xid": describe_xid(code)}))
    if gpu.error is not None:
        return replace(found, lost_at=now if found.lost_at is None else found.lost_at), actions
    if found.lost_at is not None:
        if now - found.lost_at >= _DISTURBANCE_SECONDS and not found.fault:
            found = _on_probation(found, now)
            actions.append(Notice("gpu_on_probation", {"gpu": gpu.uuid, "index": gpu.index}))
        found = replace(found, lost_at=None)
    errors = gpu.ecc_errors_uncorrected
    if errors is not None and errors > (found.ecc_errors if found.ecc_errors is not None else errors):
        found, notice = _faulty(found, gpu, "had an uncorrectable ECC error", now)
        actions.append(notice)
    found = replace(found, ecc_errors=errors)
    if found.fault and now >= found.fault_until:
        found = _on_probation(found, now)
        actions.append(Notice("gpu_on_probation", {"gpu": gpu.uuid, "index": gpu.index}))
    return _by_temperature(found, gpu, now, actions), actions


def _by_temperature(before: GpuHealth, gpu: Gpu, now: float, actions: list[Action]) -> GpuHealth:
    celsius = gpu.temperature_celsius
    is_slowed = not SLOWING_REASONS.isdisjoint(gpu.throttle_reasons)
    if celsius is None:
        return replace(before, is_hot=is_slowed, hot_since=None, is_overheated=False)
    hot_since = None
    if celsius >= OVERHEATED_CELSIUS:
        hot_since = now if before.hot_since is None else before.hot_since
    is_overheated = before.is_overheated and celsius >= COOL_CELSIUS
    is_overheated = is_overheated or (hot_since is not None and now - hot_since >= OVERHEATED_SECONDS)
    is_hot = is_slowed or celsius >= HOT_CELSIUS or (before.is_hot and celsius >= COOL_CELSIUS)
    fields = {"gpu": gpu.uuid, "index": gpu.index, "temperature_celsius": celsius}
    if is_overheated != before.is_overheated:
        actions.append(Notice("gpu_overheated" if is_overheated else "gpu_cooled_down", fields))
    elif is_hot != before.is_hot:
        reasons = sorted(SLOWING_REASONS & set(gpu.throttle_reasons))
        actions.append(Notice("gpu_hot" if is_hot else "gpu_not_hot", {**fields, "throttle_reasons": reasons}))
    return replace(before, hot_since=hot_since, is_overheated=is_overheated, is_hot=is_hot)


def _faulty(before: GpuHealth, gpu: Gpu, fault: str, now: float) -> tuple[GpuHealth, Notice]:
    faults = before.faults + 1
    seconds = min(_FAULT_SECONDS_MAX, _FAULT_SECONDS * 2.0 ** (faults - 1))
    found = replace(before, fault=fault, fault_until=now + seconds, faults=faults, probation_until=float("-inf"))
    return found, Notice("gpu_faulty", {"gpu": gpu.uuid, "index": gpu.index, "reason": fault, "seconds": seconds})


def _on_probation(before: GpuHealth, now: float) -> GpuHealth:
    return replace(before, fault="", probation_until=now + _PROBATION_SECONDS)


def _apply(fleet: FleetState, now: float) -> None:
    """Makes it a fact of the snapshot."""
    unfit: dict[GpuUuid, str] = {}
    for uuid, gpu in fleet.gpus.items():
        found = fleet.gpu_health.get(uuid)
        if found is None:
            continue
        if found.fault:
            unfit[uuid] = f"GPU {gpu.index} {found.fault}"
        elif found.is_overheated:
            unfit[uuid] = f"GPU {gpu.index} is at {gpu.temperature_celsius} °C"
    if unfit.keys() != dict(fleet.drained.unfit).keys():
        fleet.set_drained(replace(fleet.drained, unfit=tuple(unfit.items())))
    health = {uuid: found for uuid, found in fleet.gpu_health.items() if uuid in fleet.gpus}
    fleet.set_gpu_conditions(
        hot=frozenset(uuid for uuid, found in health.items() if found.is_hot),
        probation=frozenset(uuid for uuid, found in health.items() if now < found.probation_until),
    )
