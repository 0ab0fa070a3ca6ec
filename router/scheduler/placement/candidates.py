"""Where a model could be loaded: sets of GPUs, each with an instance of the model's engine, running or to be started.

Sets of one size are considered at a time. Where instances may be started on demand, each holds one model at most: a
server that already holds a model would size the next one by its own estimate and evict by its own rule. Prices nothing.
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
from router.domain.snapshot_index import instances_over, lost_gpus, memoise, residencies_of

_MAY_COME_BACK = frozenset({InstanceState.STARTING, InstanceState.BACKOFF, InstanceState.DRAINING})

_WIDE_GPUS_MAX = 10
"""Sets of several GPUs are tried among so many GPUs, the ones with most room: 252 sets at most."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One set of GPUs and the instance that would load there."""

    spec: InstanceSpec
    is_new: bool = False
    """Whether the instance would have to be started first."""

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
    """Only instances that are or would be started on demand: those can be tuned otherwise."""
    engine: str = "ollama"
    """Kind of the engine that has to serve the model."""

    def allows(self, snapshot: Snapshot, gpus: tuple[GpuUuid, ...]) -> bool:
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
    if view.state not in _MAY_COME_BACK:
        return view.state is InstanceState.READY
    if lost_gpus(snapshot.gpus, view.spec):
        return False
    since, constants = view.down_since, snapshot.policy.constants
    if view.state is InstanceState.DRAINING and (since is None or view.spec.on_demand):
        return False
    grace = constants.attached_grace_seconds if view.spec.attached else constants.restart_grace_seconds
    return since is None or snapshot.now - since < grace


def has_gpus(snapshot: Snapshot) -> bool:
    """Whether anything here runs on GPUs: then nothing lands on the CPU unless it is pinned there."""
    return any(view.spec.gpus for view in snapshot.instances.values()) or (
        snapshot.policy.instances_on_demand and bool(snapshot.gpus)
    )


def sizes(snapshot: Snapshot) -> list[int]:
    """Numbers of GPUs that a set may have, smallest first; 0 where there are no GPUs at all."""
    return memoise(snapshot, sizes, lambda: _sizes(snapshot))


def _sizes(snapshot: Snapshot) -> list[int]:
    found = {len(view.spec.gpus) for view in snapshot.instances.values() if is_alive(snapshot, view)}
    if snapshot.policy.instances_on_demand:
        found |= set(range(1, len(_usable(snapshot)) + 1))
    return sorted(size for size in found if size or not has_gpus(snapshot))


def candidates_of_size(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    """The candidates over `size` GPUs that the bounds allow."""
    if bounds.pin is None and bounds.layout is None and not snapshot.policy.exclusive_gpus:
        return memoise(
            snapshot,
            (candidates_of_size, size, bounds.only_new, bounds.engine),
            lambda: _candidates(snapshot, size, bounds),
        )
    return _candidates(snapshot, size, bounds)


def _candidates(snapshot: Snapshot, size: int, bounds: Bounds) -> list[Candidate]:
    sets = memoise(snapshot, (_sets, size), lambda: _distinct(_sets(snapshot, size)))
    return [candidate for gpus in sets if bounds.allows(snapshot, gpus) for candidate in _on(snapshot, gpus, bounds)]


def _distinct(sets: Iterator[tuple[GpuUuid, ...]]) -> list[tuple[GpuUuid, ...]]:
    """Each set of GPUs once, in the order in which it came first."""
    found: dict[frozenset[GpuUuid], tuple[GpuUuid, ...]] = {}
    for gpus in sets:
        found.setdefault(frozenset(gpus), gpus)
    return list(found.values())


def _sets(snapshot: Snapshot, size: int) -> Iterator[tuple[GpuUuid, ...]]:
    """The GPU sets of existing instances, then all further sets where instances may be started."""
    for view in snapshot.instances.values():
        if len(view.spec.gpus) == size and is_alive(snapshot, view):
            yield view.spec.gpus
    if snapshot.policy.instances_on_demand and size:
        gpus = _usable(snapshot)
        if size > 1 and len(gpus) > _WIDE_GPUS_MAX:
            gpus = sorted(sorted(gpus, key=lambda c: -c.memory_free_bytes)[:_WIDE_GPUS_MAX], key=lambda c: c.index)
        for chosen in combinations(gpus, size):
            yield tuple(gpu.uuid for gpu in chosen)


def _usable(snapshot: Snapshot) -> list[Gpu]:
    return sorted((gpu for gpu in snapshot.gpus.values() if gpu.error is None), key=lambda gpu: gpu.index)


def _on(snapshot: Snapshot, gpus: tuple[GpuUuid, ...], bounds: Bounds) -> list[Candidate]:
    """The instances over exactly these GPUs; with on-demand instances, the best empty one or else a new one."""
    over = instances_over(snapshot, frozenset(gpus))
    there = [view for view in over if is_alive(snapshot, view) and view.spec.engine == bounds.engine]
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
    like = snapshot.policy.on_demand_like
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
    if pin is not None and pin.num_parallel is not None:
        tuned = replace(tuned, num_parallel=pin.num_parallel)
    if pin is not None and pin.kv_cache_type is not None:
        tuned = replace(tuned, kv_cache_type=pin.kv_cache_type)
    return [Candidate(tuned, is_new=True)]


def _is_tuned(spec: InstanceSpec, pin: Pin | None) -> bool:
    """Returns True where the instance has the slots and the cache type that the model is pinned to."""
    if pin is None:
        return True
    slots = pin.num_parallel in (None, spec.num_parallel)
    return slots and pin.kv_cache_type in (None, spec.kv_cache_type)


def is_empty(snapshot: Snapshot, name: InstanceName) -> bool:
    """Returns True where nothing is loaded, loading or unloading there."""
    return not residencies_of(snapshot, name)


def _new_name(snapshot: Snapshot, gpus: Sequence[GpuUuid]) -> InstanceName:
    """`gpu0.2`, `gpu1+gpu3`: the GPUs, and a number from the second instance on the same GPUs on."""
    base = "+".join(f"gpu{snapshot.gpus[gpu].index}" for gpu in gpus)
    if base not in snapshot.instances:
        return InstanceName(base)
    number = 2
    while f"{base}.{number}" in snapshot.instances:
        number += 1
    return InstanceName(f"{base}.{number}")
