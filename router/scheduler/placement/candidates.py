"""Where a model could be loaded: sets of GPUs, each with an instance of the model's engine, running or to be started.

Sets of one size are considered at a time. If instances are started on demand, each holds at most one model, because a
server that already holds one would size the next by its own estimate and evict by its own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.policy import Pin
from router.domain.request import Layout
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import instances_over, lost_gpus, memoise, residencies_of, residencies_on

_MAY_COME_BACK = frozenset({InstanceState.STARTING, InstanceState.BACKOFF, InstanceState.DRAINING})

_WIDE_GPUS_MAX = 10
"""Sets of several GPUs are formed from at most this many GPUs, those with the most free memory: at most 252 sets."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One set of GPUs and the instance that would load the model there."""

    spec: InstanceSpec
    is_new: bool = False
    """True if the instance has to be started first."""

    @property
    def gpus(self) -> tuple[GpuUuid, ...]:
        return self.spec.gpus


@dataclass(frozen=True, slots=True)
class Bounds:
    """What limits the GPUs a model may use."""

    name: str
    pin: Pin | None = None
    layout: Layout | None = None
    only_new: bool = False
    """Use only instances that are, or would be, started on demand, because their slots can be chosen."""
    engine: str = "ollama"
    """Kind of the engine that has to serve the model."""
    default_context: int | None = None
    """Only instances that give requests this context by default; None: those with the usual one."""

    def are_common(self, snapshot: Snapshot) -> bool:
        """Whether they are the same for every model without rules of its own."""
        return self.pin is None and self.layout is None and not snapshot.policy.exclusive_gpus

    def allows(self, snapshot: Snapshot, gpus: tuple[GpuUuid, ...]) -> bool:
        """Returns True if pins, layout and exclusive GPUs allow this set."""
        if self.layout is not None and not self.layout.allows(gpus):
            return False
        if any(self.name not in snapshot.policy.exclusive_gpus.get(gpu, (self.name,)) for gpu in gpus):
            return False
        pin = self.pin
        if pin is None:
            return True
        if pin.cpu:
            return not gpus
        if pin.gpus and set(gpus) != set(pin.gpus):
            return False
        return not pin.spread or len(gpus) > 1


def is_alive(snapshot: Snapshot, view: InstanceView) -> bool:
    """Whether the instance serves, or is expected to soon: requests wait for it."""
    if snapshot.drained.covers(view.spec):
        return False
    if view.state not in _MAY_COME_BACK:
        return view.state is InstanceState.READY
    if lost_gpus(snapshot.gpus, view.spec):
        return False
    since, constants = view.down_since, snapshot.policy.constants
    if view.spec.name in snapshot.restarts_due:
        return not view.spec.on_demand
    if view.state is InstanceState.DRAINING and (since is None or view.spec.on_demand):
        return False
    grace = constants.attached_grace_seconds if view.spec.attached else constants.restart_grace_seconds
    return since is None or snapshot.now - since < grace


def alive_instances(snapshot: Snapshot) -> list[InstanceSpec]:
    """The instances that are alive."""
    return memoise(
        snapshot,
        alive_instances,
        lambda: [
            view.spec for view in snapshot.instances.values() if not view.spec.is_overflow and is_alive(snapshot, view)
        ],
    )


def has_gpus(snapshot: Snapshot) -> bool:
    """Returns True if any instance uses GPUs; the CPU is then used only by models pinned to it."""
    return any(view.spec.gpus for view in snapshot.instances.values()) or (
        snapshot.policy.instances_on_demand and bool(snapshot.gpus)
    )


def sizes(snapshot: Snapshot) -> list[int]:
    """Possible numbers of GPUs in a set, smallest first; 0 (the CPU) only if there are no GPUs."""
    return memoise(snapshot, sizes, lambda: _sizes(snapshot))


def _sizes(snapshot: Snapshot) -> list[int]:
    found = {len(view.spec.gpus) for view in snapshot.instances.values() if is_alive(snapshot, view)}
    if snapshot.policy.instances_on_demand:
        found |= set(range(1, len(_usable(snapshot)) + 1))
    return sorted(size for size in found if size or not has_gpus(snapshot))


def candidates_of_size(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    """The candidates over exactly `size` GPUs that the bounds allow."""
    if bounds.are_common(snapshot):
        return memoise(
            snapshot,
            (candidates_of_size, size, bounds.only_new, bounds.engine, bounds.default_context),
            lambda: _candidates(snapshot, size, bounds),
        )
    return _candidates(snapshot, size, bounds)


def _candidates(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    allowed = _allowed_sets(snapshot, size, bounds)
    return [_lasting(snapshot, candidate) for gpus in allowed for candidate in _on(snapshot, gpus, bounds)]


def _lasting(snapshot: Snapshot, candidate: Candidate) -> Candidate:
    """The object of an earlier snapshot while the candidate, and what sizes on it depend on, are the same."""
    if snapshot.lasting is None:
        return candidate
    spec = candidate.spec
    facts = snapshot.engines[spec.engine].estimate_facts(spec, snapshot)
    key = (_lasting, spec.name, spec.gpus, spec.num_parallel, spec.context_length, spec.kv_cache_type)
    return snapshot.lasting.same(key, (candidate, facts))[0]


def _allowed_sets(snapshot: Snapshot, size: int, bounds: Bounds) -> list[tuple[GpuUuid, ...]]:
    """The sets of `size` GPUs that the bounds allow."""
    sets = memoise(snapshot, (_sets, size), lambda: _distinct(_sets(snapshot, size)))
    return [gpus for gpus in sets if bounds.allows(snapshot, gpus)]


def _distinct(sets: Iterator[tuple[GpuUuid, ...]]) -> list[tuple[GpuUuid, ...]]:
    """Each set of GPUs once, in the order of first occurrence."""
    found: dict[frozenset[GpuUuid], tuple[GpuUuid, ...]] = {}
    for gpus in sets:
        found.setdefault(frozenset(gpus), gpus)
    return list(found.values())


def _sets(snapshot: Snapshot, size: int) -> Iterator[tuple[GpuUuid, ...]]:
    """The GPU sets of existing instances, then, with on-demand instances, all others of this size."""
    for view in snapshot.instances.values():
        if len(view.spec.gpus) == size and is_alive(snapshot, view):
            yield view.spec.gpus
    if snapshot.policy.instances_on_demand and size:
        gpus = _usable(snapshot)
        if size > 1 and len(gpus) > _WIDE_GPUS_MAX:
            gpus = sorted(sorted(gpus, key=lambda c: -c.memory_free_bytes)[:_WIDE_GPUS_MAX], key=lambda c: c.index)
        for chosen in combinations(gpus, size):
            yield tuple(gpu.uuid for gpu in chosen)


def may_use(snapshot: Snapshot, gpus: tuple[GpuUuid, ...]) -> bool:
    """Returns False for sets with a GPU on probation, unless no other load is under way there, and it is alone or only
    sets can test it."""
    if not snapshot.probation or snapshot.probation.isdisjoint(gpus):
        return True
    on_probation = snapshot.probation.intersection(gpus)
    if len(gpus) > 1 and not on_probation <= snapshot.tested_in_sets:
        return False
    return not any(
        gpu in on_probation for reservation in snapshot.reservations.values() for gpu, _ in reservation.per_gpu_bytes
    )


def _usable(snapshot: Snapshot) -> list[Gpu]:
    usable = (gpu for gpu in snapshot.gpus.values() if gpu.error is None and not snapshot.drained.has_gpu(gpu.uuid))
    return sorted(usable, key=lambda gpu: gpu.index)


def _on(snapshot: Snapshot, gpus: tuple[GpuUuid, ...], bounds: Bounds) -> list[Candidate]:
    """The instances over exactly these GPUs; with on-demand instances, the best empty one or a new one."""
    over = [view for view in instances_over(snapshot, frozenset(gpus)) if not view.spec.is_overflow]
    there = [view for view in over if is_alive(snapshot, view) and view.spec.engine == bounds.engine]
    there = [view for view in there if _gives_context(snapshot, view.spec, bounds.default_context)]
    pin = bounds.pin
    if not (snapshot.policy.instances_on_demand and gpus):
        return [] if bounds.only_new else [Candidate(view.spec) for view in there]
    there = [view for view in there if view.spec.attached or _is_tuned(view.spec, pin)]
    there = [view for view in there if not (view.spec.on_demand and view.state is InstanceState.BACKOFF)]
    free = [view for view in there if view.spec.attached or is_empty(snapshot, view.spec.name)]
    if bounds.only_new:
        free = [view for view in free if view.spec.on_demand]
    if free:
        best = min(free, key=lambda v: (v.state is not InstanceState.READY, v.spec.on_demand, v.spec.name))
        return [Candidate(best.spec)]
    return _to_be_started(snapshot, gpus, bounds)


def new_candidates(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    """Instances that could be started over `size` GPUs, whatever runs there already; they can be tuned otherwise."""
    if not (snapshot.policy.instances_on_demand and size):
        return []
    if bounds.are_common(snapshot):
        key = (new_candidates, size, bounds.engine, bounds.default_context)
        return memoise(snapshot, key, lambda: _new_candidates(snapshot, size, bounds))
    return _new_candidates(snapshot, size, bounds)


def _new_candidates(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    allowed = _allowed_sets(snapshot, size, bounds)
    return [_lasting(snapshot, candidate) for gpus in allowed for candidate in _to_be_started(snapshot, gpus, bounds)]


def _to_be_started(snapshot: Snapshot, gpus: tuple[GpuUuid, ...], bounds: Bounds) -> list[Candidate]:
    like, pin = snapshot.policy.on_demand_like, bounds.pin
    if any(gpu not in snapshot.gpus for gpu in gpus):
        return []
    if (
        like is None
        or like.engine != bounds.engine
        or len(snapshot.instances) >= snapshot.policy.constants.instances_max
        or frozenset(gpus) in snapshot.troubled
    ):
        return []
    like = snapshot.engines[like.engine].tuned_for(like, [snapshot.gpus[gpu] for gpu in gpus])
    tuned = replace(like, name=_new_name(snapshot, gpus), gpus=gpus, url="", on_demand=True)
    if bounds.default_context is not None:
        tuned = replace(tuned, context_length=bounds.default_context)
    if pin is not None and pin.num_parallel is not None:
        tuned = replace(tuned, num_parallel=pin.num_parallel)
    if pin is not None and pin.kv_cache_type is not None:
        tuned = replace(tuned, kv_cache_type=pin.kv_cache_type)
    return [Candidate(tuned, is_new=True)]


def _gives_context(snapshot: Snapshot, spec: InstanceSpec, default_context: int | None) -> bool:
    if default_context is not None:
        return spec.context_length == default_context
    return widened_context(snapshot, spec) is None


def widened_context(snapshot: Snapshot, spec: InstanceSpec) -> int | None:
    """The default context of an instance that was started on demand to have another one than usual, else None."""
    like = snapshot.policy.on_demand_like
    if not spec.on_demand or like is None or spec.context_length == like.context_length:
        return None
    return spec.context_length


def _is_tuned(spec: InstanceSpec, pin: Pin | None) -> bool:
    """Returns True if the instance has the slots and the cache type of the pin."""
    if pin is None:
        return True
    slots = pin.num_parallel in (None, spec.num_parallel)
    return slots and pin.kv_cache_type in (None, spec.kv_cache_type)


def is_empty(snapshot: Snapshot, name: InstanceName) -> bool:
    """Returns True if no model is planned, loading, loaded or unloading there."""
    return not residencies_of(snapshot, name)


def against_preferences(snapshot: Snapshot, gpus: Sequence[GpuUuid], name: str) -> int:
    """Counts the GPUs of a set that are hot, or that the configuration would rather give to others; 0 is best.

    A model with exclusive GPUs prefers those. A GPU that another model is pinned to is left free until that model is
    there.
    """
    policy = snapshot.policy
    hot = sum(gpu in snapshot.hot for gpu in gpus) if snapshot.hot else 0
    if not (policy.exclusive_gpus or policy.pins):
        return hot
    pinned = memoise(snapshot, _unplaced_pins, lambda: _unplaced_pins(snapshot))
    has_own = any(name in names for names in policy.exclusive_gpus.values())
    foreign = sum(not is_exclusive_to(snapshot, gpu, name) for gpu in gpus) if has_own else 0
    return hot + foreign + sum(bool(pinned.get(gpu, frozenset()) - {name}) for gpu in gpus)


def is_exclusive_to(snapshot: Snapshot, gpu: GpuUuid, name: str) -> bool:
    """Returns True where the GPU is exclusive to the model, alone or with others."""
    return name in snapshot.policy.exclusive_gpus.get(gpu, ())


def _unplaced_pins(snapshot: Snapshot) -> dict[GpuUuid, frozenset[str]]:
    """For each GPU the models that are pinned to it and not there, neither loaded nor on their way."""
    found: dict[GpuUuid, frozenset[str]] = {}
    for name, pin in snapshot.policy.pins.items():
        for gpu in pin.gpus:
            if all(snapshot.residencies[key].name != name for key in residencies_on(snapshot, gpu)):
                found[gpu] = found.get(gpu, frozenset()) | {name}
    return found


def _new_name(snapshot: Snapshot, gpus: Sequence[GpuUuid]) -> InstanceName:
    """The GPUs, and a number from the second instance over the same GPUs on: `gpu1+gpu3`, `gpu0.2`."""
    base = "+".join(f"gpu{snapshot.gpus[gpu].index}" for gpu in gpus)
    if base not in snapshot.instances:
        return InstanceName(base)
    number = 2
    while f"{base}.{number}" in snapshot.instances:
        number += 1
    return InstanceName(f"{base}.{number}")
