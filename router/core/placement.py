"""Where a model that is not loaded goes: one card where it fits, else the spread instance, else nowhere.

Three passes over the instances, each stricter about what may be disturbed: room that is free now, room that idle
models leave, room that busy ones will leave. An instance over several cards is looked at only where no single card
could hold the model even when empty, and one without cards only where the fleet has no cards at all: a model never
lands on the CPU by accident. Every answer says why.

It decides; it changes nothing. Sizes come from the `Estimate` it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.core.entities import (
    Failure,
    GpuUuid,
    InstanceName,
    InstanceSpec,
    InstanceState,
    InstanceView,
    Layout,
    ModelFacts,
    ResidencyKey,
    ResidencyState,
    RunnerOptions,
    Snapshot,
)
from router.core.eviction import choose_evictions, evictable
from router.core.ledger import available_bytes, bytes_by_gpu, capacity_bytes

Estimate = Callable[[ModelFacts, InstanceSpec, int, Snapshot], tuple[int, ...]]
"""(model, instance, context in tokens, facts) -> bytes on each card of the instance, in its card order."""

GIB = 1024**3

_ALIVE = frozenset({InstanceState.READY, InstanceState.STARTING, InstanceState.BACKOFF})


@dataclass(frozen=True, slots=True)
class Placed:
    """Load it here. With `evict` or bytes still coming back, the load waits until its room shows as free."""

    instance: InstanceName
    per_gpu_bytes: tuple[tuple[GpuUuid, int], ...]
    evict: tuple[ResidencyKey, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class MustWait:
    """It fits, but not yet. `drain`: busy models that would have to take no new requests to make room."""

    reason: str
    drain: tuple[ResidencyKey, ...] = ()


@dataclass(frozen=True, slots=True)
class NoFit:
    """It fits nowhere, now or later."""

    code: str
    message: str
    status: int | None = None


Decision = Placed | MustWait | NoFit


@dataclass(frozen=True, slots=True)
class _Candidate:
    view: InstanceView
    need: tuple[tuple[GpuUuid, int], ...]
    could_fit: bool

    @property
    def name(self) -> InstanceName:
        return self.view.spec.name


def context_of(options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
    """Tokens of context a slot gets: the asked one or the instance's default, cut to the trained one."""
    asked = dict(options).get("num_ctx")
    context = int(asked) if asked is not None else spec.context_length
    return max(4, min(context, model.context_length) if model.context_length > 0 else context)


def place(
    snapshot: Snapshot, estimate: Estimate, model: ModelFacts, options: RunnerOptions, layout: Layout | None = None
) -> Decision:
    """Chooses an instance for a load of `model` with `options`, on such cards as `layout` allows.

    Same facts, same answer.
    """
    alive = [v for v in snapshot.instances.values() if v.state in _ALIVE]
    if not alive:
        return NoFit("no_instance", "no Ollama instance is running: " + _states(snapshot))
    holding = [v for v in alive if model.is_on(v.spec)]
    if not holding:
        return NoFit("no_instance", f"no instance that has model '{model.name}' is running: " + _states(snapshot))
    allowed = [v for v in holding if layout is None or layout.allows(v.spec.gpus)]
    if layout is not None and not allowed:
        return NoFit("layout_unavailable", f"no running instance is laid out as asked ({_layout_words(layout)})")
    candidates = [_candidate(snapshot, estimate, v, model, options) for v in allowed]
    group = _smallest_holding(candidates)
    if not group:
        return _too_large(snapshot, candidates, model, layout)
    failures = [f for f in (_failure(snapshot, c, model, options) for c in group) if f is not None]
    if len(failures) == len(group):
        return NoFit("load_failed", failures[-1].message, failures[-1].status)
    failed = {f.instance for f in failures}
    usable = [c for c in group if c.view.state is InstanceState.READY and c.name not in failed]
    usable = [c for c in usable if not _in_transit(snapshot, c, model)]
    return _fits_now(snapshot, usable, model) or _fits_after(snapshot, usable, model) or _wait(snapshot, group, model)


def _candidate(
    snapshot: Snapshot, estimate: Estimate, view: InstanceView, model: ModelFacts, options: RunnerOptions
) -> _Candidate:
    spec = view.spec
    sizes = estimate(model, spec, context_of(options, model, spec), snapshot)
    need = tuple(zip(spec.gpus, sizes, strict=True))
    return _Candidate(view, need, all(capacity_bytes(snapshot, gpu) >= size for gpu, size in need))


def _smallest_holding(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The candidates with the fewest cards that could hold the model; without cards only where none has any."""
    with_cards = [c for c in candidates if c.view.spec.gpus]
    if not with_cards:
        return list(candidates)
    holding = [c for c in with_cards if c.could_fit]
    fewest = min((len(c.need) for c in holding), default=0)
    return [c for c in holding if len(c.need) == fewest]


def _in_transit(snapshot: Snapshot, candidate: _Candidate, model: ModelFacts) -> bool:
    """True where this very model is on its way in or out of the instance, or busy there with other options."""
    here = snapshot.residencies.get((candidate.name, model.blob))
    return here is not None and not here.is_idle


def _fits_now(snapshot: Snapshot, candidates: Sequence[_Candidate], model: ModelFacts) -> Placed | None:
    free = [
        c
        for c in candidates
        if all(available_bytes(snapshot, gpu) >= size for gpu, size in c.need)
        and (c.name, model.blob) not in snapshot.residencies
    ]
    if not free:
        return None
    best = min(free, key=lambda c: _preference(snapshot, c))
    return Placed(best.name, best.need, (), f"{best.name}: {_fit_words(snapshot, best)}")


def _preference(snapshot: Snapshot, candidate: _Candidate) -> tuple[int, int, float, int, str]:
    """Least busy cards first, then least filled, then the faster, then the roomier, then by name."""
    cards = set(candidate.view.spec.gpus)
    mates = [
        r
        for r in snapshot.residencies.values()
        if r.instance == candidate.name or any(gpu in cards for gpu, _ in bytes_by_gpu(snapshot, r))
    ]
    speed = sum((snapshot.gpus[g].bandwidth_bytes_per_second or 0.0) for g in cards if g in snapshot.gpus)
    room = sum(available_bytes(snapshot, g) for g in cards)
    return (sum(r.in_flight for r in mates), len(mates), -speed, -room, candidate.name)


def _fits_after(snapshot: Snapshot, candidates: Sequence[_Candidate], model: ModelFacts) -> Placed | None:
    """The candidate whose room costs least to make from idle models: fewest bytes to unload, then as preferred."""
    options: list[tuple[int, tuple[int, int, float, int, str], _Candidate, tuple[ResidencyKey, ...]]] = []
    for candidate in candidates:
        evict = _evictions(snapshot, candidate, model, busy=False)
        if evict is not None:
            cost = sum(sum(snapshot.residencies[key].per_gpu_bytes) for key in evict)
            options.append((cost, _preference(snapshot, candidate), candidate, evict))
    if not options:
        return None
    _, _, best, evict = min(options, key=lambda o: (o[0], o[1]))
    names = ", ".join(snapshot.residencies[key].name for key in evict)
    how = f"after unloading {names}" if evict else "once freed memory shows"
    return Placed(best.name, best.need, evict, f"{best.name}: fits {how}")


def _evictions(
    snapshot: Snapshot, candidate: _Candidate, model: ModelFacts, *, busy: bool
) -> tuple[ResidencyKey, ...] | None:
    own = (candidate.name, model.blob)
    own_bytes: dict[GpuUuid, int] = {}
    if own in snapshot.residencies:
        own_bytes = dict(bytes_by_gpu(snapshot, snapshot.residencies[own]))
    coming = _coming_back(snapshot)
    shortfall = {
        gpu: size - available_bytes(snapshot, gpu) - coming.get(gpu, 0) - own_bytes.get(gpu, 0)
        for gpu, size in candidate.need
    }
    cards = [gpu for gpu, _ in candidate.need]
    others = [r for r in evictable(snapshot, cards, busy=busy) if (r.instance, r.blob) != own]
    evict = choose_evictions(snapshot, shortfall, others)
    if evict is None:
        return None
    return (own, *evict) if own in snapshot.residencies else evict


def _coming_back(snapshot: Snapshot) -> dict[GpuUuid, int]:
    """Bytes that unloads under way will free; never more than a card still has in use beside its loaded models, since a
    reading may show memory as free before the unload is known to have ended."""
    coming: dict[GpuUuid, int] = {}
    loaded: dict[GpuUuid, int] = {}
    for residency in snapshot.residencies.values():
        if residency.state in (ResidencyState.UNLOADING, ResidencyState.READY):
            totals = coming if residency.state is ResidencyState.UNLOADING else loaded
            for gpu, size in bytes_by_gpu(snapshot, residency):
                totals[gpu] = totals.get(gpu, 0) + size
    return {gpu: min(size, _in_use(snapshot, gpu, loaded.get(gpu, 0))) for gpu, size in coming.items()}


def _in_use(snapshot: Snapshot, gpu: GpuUuid, loaded_bytes: int) -> int:
    card = snapshot.gpus.get(gpu)
    return max(0, card.memory_used_bytes - loaded_bytes) if card is not None else 0


def _wait(snapshot: Snapshot, candidates: Sequence[_Candidate], model: ModelFacts) -> MustWait:
    """Which busy models stand in the way, on the candidate with the fewest of their requests."""
    plans: list[tuple[int, int, str, tuple[ResidencyKey, ...]]] = []
    for candidate in candidates:
        if candidate.view.state is InstanceState.READY:
            drain = _evictions(snapshot, candidate, model, busy=True)
            if drain is not None:
                running = sum(snapshot.residencies[key].in_flight for key in drain)
                plans.append((running, len(drain), candidate.name, drain))
    if not plans:
        return MustWait("waits until an instance is ready or loads under way have ended")
    running, _, name, drain = min(plans)
    return MustWait(f"{name}: waits for {running} running requests of {len(drain)} models to make room", drain)


def _failure(snapshot: Snapshot, candidate: _Candidate, model: ModelFacts, options: RunnerOptions) -> Failure | None:
    for failure in snapshot.failures:
        if (failure.instance, failure.blob, failure.options) == (candidate.name, model.blob, options):
            return failure
    return None


def _too_large(
    snapshot: Snapshot, candidates: Sequence[_Candidate], model: ModelFacts, layout: Layout | None
) -> Decision:
    """422, or 409 where other cards might hold it, unless memory is still settling."""
    if snapshot.now - snapshot.changed_at < snapshot.policy.settle_seconds:
        return MustWait("waits until the cards show what the last load or unload changed")
    lines = [f"{c.name}: {_short_words(snapshot, c)}" for c in candidates if c.view.spec.gpus]
    if layout is not None:
        words = f"model '{model.name}' does not fit as asked ({_layout_words(layout)}): "
        return NoFit("layout_unavailable", words + "; ".join(lines))
    return NoFit("model_too_large", f"model '{model.name}' fits nowhere: " + "; ".join(lines))


def _layout_words(layout: Layout) -> str:
    return layout.kind.value if layout.gpu is None else f"{layout.kind.value}:{layout.gpu}"


def _fit_words(snapshot: Snapshot, candidate: _Candidate) -> str:
    if not candidate.need:
        return "no cards, runs on the CPU"
    return ", ".join(
        f"card {_index(snapshot, gpu)} needs {size / GIB:.1f} of {available_bytes(snapshot, gpu) / GIB:.1f} GiB free"
        for gpu, size in candidate.need
    )


def _short_words(snapshot: Snapshot, candidate: _Candidate) -> str:
    return ", ".join(
        f"card {_index(snapshot, gpu)} needs {size} bytes ({size / GIB:.1f} GiB) and can give "
        f"{capacity_bytes(snapshot, gpu)} bytes ({capacity_bytes(snapshot, gpu) / GIB:.1f} GiB)"
        for gpu, size in candidate.need
    )


def _index(snapshot: Snapshot, gpu: GpuUuid) -> str:
    card = snapshot.gpus.get(gpu)
    return str(card.index) if card else gpu


def _states(snapshot: Snapshot) -> str:
    words = [
        f"{v.spec.name} is {v.state.value}" + (f" ({v.reason})" if v.reason else "")
        for v in snapshot.instances.values()
    ]
    return "; ".join(words) or "none is configured"
