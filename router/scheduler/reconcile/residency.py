"""The steps in a residency's life, as functions the dispatcher applies to its state.

PLANNED (room reserved) -> LOADING (sent) -> READY -> UNLOADING -> forgotten. What a server lists that the router did
not load enters at READY; what a server no longer lists is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from router.domain.actions import Action, Load, Notice, Unload, UnloadCause
from router.domain.engine_rules import EngineRules
from router.domain.events import LoadedModel, ResidencyRead
from router.domain.ids import LoadId
from router.domain.instance import InstanceSpec, InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.request import RunnerOptions
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey, ResidencyState, cpu_ratio, is_spill
from router.domain.snapshot import Estimate, Snapshot
from router.domain.vram_ledger import room_bytes
from router.scheduler.placement.placement import Placed
from router.scheduler.state import FleetState, expiry


def planned(
    fleet: FleetState, model: ModelFacts, placed: Placed, spec: InstanceSpec, load_id: LoadId, now: float
) -> Residency:
    """The residency of a load whose room is reserved."""
    engine = fleet.engines[spec.engine]
    return Residency(
        instance=placed.instance,
        blob=model.blob,
        name=model.name,
        options=placed.options,
        state=ResidencyState.PLANNED,
        slots=engine.slots(model, spec),
        in_flight=0,
        per_gpu_bytes=tuple(size for _, size in placed.per_gpu_bytes),
        context_length=engine.context_length(placed.options, model, spec),
        loaded_at=now,
        used_at=now,
        expires_at=None,
        keep_alive_seconds=fleet.policy.keep_alive_seconds,
        load_id=load_id,
        reason=placed.reason,
        model=model,
    )


def has_room(snapshot: Snapshot, reservation: Reservation) -> bool:
    """True when the instance is up and every GPU's live free memory covers the load's share."""
    view = snapshot.instances.get(reservation.instance)
    if view is None or view.state is not InstanceState.READY:
        return False
    return all(room_bytes(snapshot, gpu, reservation) >= size for gpu, size in reservation.per_gpu_bytes)


def send(fleet: FleetState, residency: Residency, reservation: Reservation, now: float) -> Load:
    """Moves PLANNED to LOADING and returns the load to send."""
    key = (residency.instance, residency.blob)
    fleet.put_reservation(replace(reservation, sent_at=now))
    fleet.sent(residency.model.weights_bytes, now, is_unasked=reservation.is_unasked)
    spec = fleet.instances[residency.instance].spec
    engine = fleet.engines[spec.engine]
    model, context, snapshot = residency.model, residency.context_length, fleet.snapshot(now)
    reason = residency.reason + engine.explain_override(model, spec, context, snapshot)
    fleet.update(key, state=ResidencyState.LOADING, reason=reason)
    is_certain = engine.is_split_certain(model, spec, context, snapshot)
    measured = engine.footprint_key(model, spec, context, snapshot)
    fleet.begin_measuring(reservation, measured, is_certain=is_certain)
    return Load(
        load_id=reservation.load_id,
        instance=residency.instance,
        url=spec.url,
        model=residency.model,
        options=engine.load_options(residency.model, residency.options, spec.context_length),
        expects_gpu=bool(spec.gpus),
        timeout_seconds=fleet.policy.load_timeout_seconds,
        reason=reason,
        evicted=len(reservation.evict),
        measures_speed=spec.is_overflow,
    )


def finish_reservation(fleet: FleetState, load_id: LoadId, now: float) -> None:
    """The load succeeded: its reservation is kept until the GPUs are read again."""
    reservation = fleet.reservations[load_id]
    if reservation.per_gpu_bytes:
        fleet.put_reservation(replace(reservation, finished_at=now))
    else:
        fleet.drop_reservation(load_id)


def make_room(fleet: FleetState, key: ResidencyKey, model: ModelFacts) -> Unload:
    """The unload of a replica whose room `model` needs."""
    if key[1] == model.blob:
        cause = UnloadCause.RELOADED
    else:
        cause = UnloadCause.MOVED if has_other_replica(fleet, key) else UnloadCause.EVICTED
    return unload(fleet, key, f"makes room for {model.name}", cause)


def has_other_replica(fleet: FleetState, key: ResidencyKey) -> bool:
    """Whether the model has a replica elsewhere that serves or is coming."""
    return any(
        other != key and other[1] == key[1] and replica.state is not ResidencyState.UNLOADING
        for other, replica in fleet.replicas.items()
    )


def unload(fleet: FleetState, key: ResidencyKey, reason: str, cause: UnloadCause = UnloadCause.OTHER) -> Unload:
    """Moves READY to UNLOADING and returns the unload to send; the same once more for one that failed."""
    residency = fleet.update(key, state=ResidencyState.UNLOADING, expires_at=None)
    fleet.touched(residency.instance)
    url = fleet.instances[residency.instance].spec.url
    return Unload(residency.instance, url, residency.model, residency.blob, reason, cause)


def describe_wait(replicas: Iterable[Residency]) -> str:
    """What a ticket waits for if its model is loaded or loading."""
    words = {
        ResidencyState.PLANNED: "room is being made on {r.instance}",
        ResidencyState.LOADING: "it is being loaded on {r.instance}",
        ResidencyState.READY: "{r.in_flight} of {r.slots} slots are in use on {r.instance}",
        ResidencyState.UNLOADING: "it is being unloaded from {r.instance}",
    }
    return "; ".join(words[r.state].format(r=r) for r in replicas)


def reconcile(fleet: FleetState, event: ResidencyRead, estimate: Estimate, now: float) -> list[Action]:
    """Updates an instance's residencies to what its server lists: adopts new, forgets missing, corrects sizes.

    Returns reports of models that are on the CPU although their instance has GPUs.
    """
    view = fleet.instances.get(event.instance)
    if view is None or view.state is not InstanceState.READY:
        return []
    actions: list[Action] = []
    listed = {row.model.blob: row for row in event.models if row.model is not None}
    digests = {row.digest for row in event.models}
    for key, residency in list(fleet.residencies.items()):
        # A model whose name was given to another since is still listed, by the digest that it was loaded with.
        absent = key[1] not in listed and residency.model.digest not in digests
        if key[0] == event.instance and absent and _is_gone(residency, event, fleet):
            fleet.forget(key)
    for blob, row in listed.items():
        known = fleet.residencies.get((event.instance, blob))
        is_news = known is None and event.read_at > fleet.changed_at
        if is_news:
            _adopt(fleet, view, row, estimate, now)
        elif known is not None and known.state is ResidencyState.READY and _is_news(known, row):
            is_news = True
            fleet.update((event.instance, blob), size_bytes=row.size_bytes, size_vram_bytes=row.size_vram_bytes)
        actions += _report_spill(fleet, view, blob) if is_news else []
    return actions


def is_unasked_spill(fleet: FleetState, model: ModelFacts, size_bytes: int, size_vram_bytes: int) -> bool:
    """Whether a loaded model is partly on the CPU, and its Modelfile does not ask for it."""
    is_asked = fleet.engines[model.engine].sets_own_layers
    return is_spill(model, size_bytes, size_vram_bytes) and not is_asked(model)


def _report_spill(fleet: FleetState, view: InstanceView, blob: BlobDigest) -> list[Action]:
    """Reports a model that its server has put on the CPU by its own rules, unless its Modelfile asks for it."""
    residency = fleet.residencies.get((view.spec.name, blob))
    if residency is None or residency.state is not ResidencyState.READY or not view.spec.gpus:
        return []
    sizes = residency.size_bytes, residency.size_vram_bytes
    if not is_unasked_spill(fleet, residency.model, *sizes):
        return []
    fields = {"model": residency.name, "instance": view.spec.name, "cpu_percent": round(100.0 * cpu_ratio(*sizes))}
    return [Notice("model_on_cpu", fields)]


def _is_news(known: Residency, row: LoadedModel) -> bool:
    return (known.size_bytes, known.size_vram_bytes) != (row.size_bytes, row.size_vram_bytes)


def at_least(per_gpu_bytes: tuple[int, ...], reported_bytes: int) -> tuple[int, ...]:
    """Bytes that a model holds on each GPU, raised in proportion to the total that its server reports: with a low
    estimate the router would never see the room that unloading it makes."""
    total = sum(per_gpu_bytes)
    if not 0 < total < reported_bytes:
        return per_gpu_bytes
    return tuple(size * reported_bytes // total for size in per_gpu_bytes)


def _is_gone(residency: Residency, event: ResidencyRead, fleet: FleetState) -> bool:
    """Whether a listing without it says that it left: not one from before its load, nor while its unload is out."""
    if residency.state is ResidencyState.UNLOADING:
        return residency.expires_at is not None and event.read_at > fleet.changed_at
    return residency.state is ResidencyState.READY and event.read_at > residency.loaded_at


def _adopt(fleet: FleetState, view: InstanceView, row: LoadedModel, estimate: Estimate, now: float) -> None:
    """Adopts a model that something else loaded there, with the options that its context length implies."""
    model = row.model
    if model is None:
        return
    engine = fleet.engines[view.spec.engine]
    options = _options_of(engine, row, model, view.spec)
    context = engine.context_length(options, model, view.spec)
    fleet.version += 1
    residency = Residency(
        instance=view.spec.name,
        blob=model.blob,
        name=row.name,
        options=options,
        state=ResidencyState.READY,
        slots=engine.slots(model, view.spec),
        in_flight=0,
        per_gpu_bytes=_measured(row, estimate(model, view.spec, context, fleet.snapshot(now))),
        context_length=context,
        loaded_at=now,
        used_at=now,
        expires_at=expiry(fleet.policy.keep_alive_seconds, now),
        keep_alive_seconds=fleet.policy.keep_alive_seconds,
        size_bytes=row.size_bytes,
        size_vram_bytes=row.size_vram_bytes,
        reason=f"found loaded on {view.spec.name}",
        model=model,
    )
    fleet.put_residency(residency)


def _measured(row: LoadedModel, estimated: tuple[int, ...]) -> tuple[int, ...]:
    """The estimate in proportion to the total that the server reports, if it does."""
    total = sum(estimated)
    if not total or (row.model is not None and row.model.is_opaque and not row.size_vram_bytes):
        return estimated
    return tuple(size * row.size_vram_bytes // total for size in estimated)


def _options_of(
    engine: EngineRules[Snapshot], row: LoadedModel, model: ModelFacts, spec: InstanceSpec
) -> RunnerOptions:
    """The model's default options with the context that the server lists."""
    default = engine.context_length((), model, spec)
    context = default if row.context_length is None else row.context_length
    return engine.options_with_context(model, context, default)
