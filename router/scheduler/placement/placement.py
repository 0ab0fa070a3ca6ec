"""Chooses where a model is loaded: the smallest set of GPUs that can hold it, which instance, and what is evicted.

Set sizes are tried from one GPU upwards; the first size that could hold the model on empty GPUs is used. Of its sets
the cheapest for clients wins: free room first, then room of idle models, then room of busy models. A model never lands
on the CPU by accident. Every answer has a reason.

Changes nothing. Sizes in bytes come from the `Estimate` argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from router.domain.explanation import CandidateReport, Verdict
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.request import Layout, RunnerOptions
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Estimate, Failure, Snapshot
from router.domain.snapshot_index import (
    gpus_of,
    replicas_of,
    residencies_of,
    residencies_on,
)
from router.domain.vram_ledger import available_bytes, is_settling, nominal_bytes
from router.scheduler.placement.candidate_size import Need, SizedCandidate, Sizer, capacities, fits, free_room
from router.scheduler.placement.candidates import (
    Bounds,
    Candidate,
    against_preferences,
    alive_instances,
    candidates_of_size,
    is_exclusive_to,
    may_use,
    new_candidates,
    sizes,
)
from router.scheduler.placement.cost import fewer_slots_price, swap_price
from router.scheduler.placement.departures import Departures, common_departures, departures, most_room
from router.scheduler.placement.explain import (
    explain_fit,
    explain_obstacles,
    explain_shortfall,
    explain_state,
    explain_states,
)
from router.scheduler.placement.unavailable import explain_unavailable

_Preference = tuple[int, int, int, int, float, float, int, int, str]

_LOST_SECONDS = 1.0
"""For this long after a server was lost with a load, it may still be listed as ready."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A model that shall be loaded, for whom and how."""

    model: ModelFacts
    options: RunnerOptions = ()
    layout: Layout | None = None
    may_drain: bool = False
    """Whether busy models may be stopped from taking new requests for its sake."""
    may_evict_young: bool = False
    price_max: float = float("inf")
    """Nothing is unloaded that costs more seconds than this."""
    not_on: frozenset[InstanceName] = frozenset()
    """Instances that have a replica already."""
    may_use_fewer_slots: bool = False
    """Whether it may get fewer slots than configured, in free room, where that costs less than swaps that follow."""
    repeats_spill: bool = False
    """Whether a load that spilled is tried there again."""
    supersedes: frozenset[ResidencyKey] = frozenset()
    """Replicas that the new one makes useless: they cost nothing to unload."""
    default_context: int | None = None
    """The context that the instance must give requests by default; None: the usual one."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Load it there, once `evict` has left and its room shows. Busy ones among `evict` take no new requests."""

    instance: InstanceName
    per_gpu_bytes: Need
    evict: tuple[ResidencyKey, ...]
    reason: str
    options: RunnerOptions = ()
    start: InstanceSpec | None = None
    """The instance where it has to be started first."""


@dataclass(frozen=True, slots=True)
class MustWait:
    """It fits, but not yet. `drain`: busy models that would have to take no new requests to make room. `price`: seconds
    that others would lose if idle models made room now, where that is what is too much."""

    reason: str
    drain: tuple[ResidencyKey, ...] = ()
    price: float | None = None
    too_dear: tuple[ResidencyKey, ...] = ()
    """The idle models whose price that is."""


@dataclass(frozen=True, slots=True)
class NoFit:
    """It fits nowhere, now or later."""

    code: str
    message: str
    status: int | None = None


Decision = Placed | MustWait | NoFit


class _Offer(NamedTuple):
    """A candidate with who has to leave for it."""

    sized: SizedCandidate
    leaving: Departures


def place(snapshot: Snapshot, estimate: Estimate, request: PlacementRequest) -> Decision:
    """Chooses where to load the model. The same snapshot gives the same answer."""
    model = request.model
    bounds = _bounds(snapshot, request)
    if bounds.pin is not None and bounds.pin.cpu:
        return _on_cpu(snapshot, request, bounds)
    alive = alive_instances(snapshot)
    if not any(spec.engine == model.engine for spec in alive):
        title = snapshot.engines[model.engine].title
        return NoFit("no_instance", f"no {title} instance is running: " + explain_states(snapshot))
    if not any(model.is_on(spec) for spec in alive):
        message = f"no instance that has model '{model.name}' is running: "
        return NoFit("no_instance", message + explain_states(snapshot))
    if snapshot.engines[model.engine].runs_elsewhere(model):
        return _elsewhere(snapshot, request, bounds)
    sizer, room = Sizer(snapshot, estimate, model, request.options), capacities(snapshot)
    tried: list[SizedCandidate] = []
    for fewer_slots in (False, True):
        for size in sizes(snapshot):
            candidates = _that_may_load(snapshot, candidates_of_size(snapshot, size, bounds), model)
            if size <= 1 and not fewer_slots:
                sized_candidates = [sizer.sized(c, c.spec.num_parallel) for c in candidates]
            else:
                sized_candidates = [_candidate(snapshot, sizer, c, request, fewer_slots) for c in candidates]
            group = [c for c in sized_candidates if fits(c.need, room)]
            if group and _spilled_once(snapshot, group, request):
                smaller = _with_fewer_slots(snapshot, sizer, size, bounds, request)
                return _among(snapshot, smaller or group, replace(request, repeats_spill=True))
            if group:
                decision = _among(snapshot, group, request)
                return _next_to_others(snapshot, sizer, size, bounds, request, decision) or decision
            unsplit = _unsplit(snapshot, sizer, bounds, request) if size == 1 and not fewer_slots else None
            if unsplit is not None:
                return unsplit
            tried += [] if fewer_slots else sized_candidates
        bounds = replace(bounds, only_new=True)
    gone = explain_unavailable(snapshot, estimate, model, request.options, replace(bounds, only_new=False))
    if gone is not None:
        return NoFit("no_instance", f"model '{model.name}' fits nowhere now: {gone}")
    return _nowhere(snapshot, tried, request)


def _bounds(snapshot: Snapshot, request: PlacementRequest) -> Bounds:
    model = request.model
    return Bounds(
        model.name,
        snapshot.policy.pins.get(model.name),
        request.layout,
        engine=model.engine,
        default_context=request.default_context,
    )


def _on_cpu(snapshot: Snapshot, request: PlacementRequest, bounds: Bounds) -> Decision:
    candidates = [
        candidate for candidate in candidates_of_size(snapshot, 0, bounds) if request.model.is_on(candidate.spec)
    ]
    if not candidates:
        return NoFit("model_too_large", f"model '{request.model.name}' is pinned to the CPU and no instance runs there")
    return _among(snapshot, [SizedCandidate(candidate, ()) for candidate in candidates], request)


def _elsewhere(snapshot: Snapshot, request: PlacementRequest, bounds: Bounds) -> Decision:
    """On any server that has it: there is nothing to make room for."""
    candidates = _that_may_load(snapshot, candidates_of_size(snapshot, 0, bounds), request.model)
    if not candidates:
        message = f"the request's layout needs GPUs, and model '{request.model.name}' runs on none of this machine"
        return NoFit("model_too_large", message)
    found = _among(snapshot, [SizedCandidate(candidate, ()) for candidate in candidates], request)
    return (
        replace(found, reason=f"{found.instance}: a server of its own has it") if isinstance(found, Placed) else found
    )


def _that_may_load(snapshot: Snapshot, candidates: Sequence[Candidate], model: ModelFacts) -> list[Candidate]:
    """Those whose server has the model, and no replica of it that it fails to unload."""
    stuck = {r.instance for r in replicas_of(snapshot, model.blob) if r.is_stuck}
    return [c for c in candidates if model.is_on(c.spec) and c.spec.name not in stuck]


def _candidate(
    snapshot: Snapshot, sizer: Sizer, candidate: Candidate, request: PlacementRequest, fewer_slots: bool
) -> SizedCandidate:
    *larger, smallest = _slot_numbers(snapshot, candidate, request, fewer_slots)
    for slots in larger:
        sized = sizer.sized(candidate, slots)
        if fits(sized.need, capacities(snapshot)):
            return sized
    return sizer.sized(candidate, smallest)


def _slot_numbers(snapshot: Snapshot, candidate: Candidate, request: PlacementRequest, fewer_slots: bool) -> range:
    """The numbers of slots to try for a candidate, at least one, the best first.

    A new instance over several GPUs may get more slots than the tuning says: what a large model leaves free on its GPUs
    is of little use to others. With `fewer_slots` the number goes down to one, which is better than a refusal.
    """
    own = candidate.spec.num_parallel
    if not candidate.is_new or (len(candidate.gpus) <= 1 and not fewer_slots):
        return range(own, own - 1, -1)
    pin = snapshot.policy.pins.get(request.model.name)
    if pin is not None and pin.num_parallel is not None:
        return range(own, own - 1, -1)
    bonus = snapshot.policy.constants.slots_bonus_max if len(candidate.gpus) > 1 else 0
    return range(own + bonus, (1 if fewer_slots else own) - 1, -1)


def _next_to_others(
    snapshot: Snapshot, sizer: Sizer, size: int, bounds: Bounds, request: PlacementRequest, decision: Decision
) -> Placed | None:
    """Free room for the model with fewer slots, where swaps would cost more: `decision` has others leave that come back
    and drive it out again. None where there is none."""
    if not request.may_use_fewer_slots or isinstance(decision, NoFit) or replicas_of(snapshot, request.model.blob):
        return None
    like = snapshot.policy.on_demand_like
    slots = like.num_parallel if like is not None else 0
    to_swap = swap_price(snapshot, request.model, _leaving(snapshot, decision))
    for fewer in range(slots, 0, -1):
        price = fewer_slots_price(snapshot, request.model, slots, fewer)
        if price >= to_swap:
            return None
        smaller = _with_fewer_slots(snapshot, sizer, size, bounds, request, slots - fewer)
        found = _fits_now(snapshot, [c for c in smaller if _failure(snapshot, c, request) is None], request)
        stuck = would_swap(snapshot, decision, found) if found is not None else []
        if found is not None and price < swap_price(snapshot, request.model, stuck):
            names = ", ".join(r.name for r in stuck)
            return replace(found, reason=f"{found.reason}; with fewer slots ({fewer}), so that {names} need not leave")
    return None


def _unsplit(snapshot: Snapshot, sizer: Sizer, bounds: Bounds, request: PlacementRequest) -> Decision | None:
    """A place on one GPU with fewer slots than configured: a model over several GPUs is slower, and keeps others
    from each of them. None where no GPU holds the model with one slot."""
    like = snapshot.policy.on_demand_like
    if not request.may_use_fewer_slots or like is None:
        return None
    for fewer_by in range(1, like.num_parallel):
        smaller = _with_fewer_slots(snapshot, sizer, 1, bounds, request, fewer_by)
        if smaller and not _spilled_once(snapshot, smaller, request):
            decision = _among(snapshot, smaller, request)
            if not isinstance(decision, Placed):
                return decision
            slots = like.num_parallel - fewer_by
            return replace(decision, reason=f"{decision.reason}; with fewer slots ({slots}), so that one GPU holds it")
    return None


def would_swap(snapshot: Snapshot, decision: Placed | MustWait, instead: Placed) -> list[Residency]:
    """Models that would leave by `decision` and that, without a place elsewhere, would drive the new one out again when
    they come back, where `instead` leaves them alone."""
    gpus = frozenset(gpu for gpu, _ in instead.per_gpu_bytes)
    return [r for r in _leaving(snapshot, decision) if not _has_place_outside(snapshot, r, gpus)]


def _leaving(snapshot: Snapshot, decision: Placed | MustWait) -> list[Residency]:
    keys = decision.evict if isinstance(decision, Placed) else (*decision.drain, *decision.too_dear)
    keeps_warm = snapshot.policy.keeps_warm
    return [r for key in keys if (r := snapshot.residencies.get(key)) is not None and not keeps_warm(r.name)]


def _has_place_outside(snapshot: Snapshot, residency: Residency, gpus: frozenset[GpuUuid]) -> bool:
    """Returns True where other GPUs could hold the model, so that it need not come back to these."""
    bounds = Bounds(residency.name, snapshot.policy.pins.get(residency.name))
    size = max(residency.per_gpu_bytes, default=0)
    others = [gpu for gpu, room in capacities(snapshot).items() if gpu not in gpus and room >= size]
    width = len(residency.per_gpu_bytes)
    return any(bounds.allows(snapshot, chosen) for chosen in combinations(others, width))


def _with_fewer_slots(
    snapshot: Snapshot, sizer: Sizer, size: int, bounds: Bounds, request: PlacementRequest, fewer_by: int = 1
) -> list[SizedCandidate]:
    """New instances over `size` GPUs on which the model has so many slots fewer and could fit; none where it has one
    slot anyway, or where the number is configured."""
    model, pin, found, room = request.model, bounds.pin, list[SizedCandidate](), capacities(snapshot)
    if pin is not None and pin.num_parallel is not None:
        return found
    for candidate in new_candidates(snapshot, size, bounds):
        slots = candidate.spec.num_parallel - fewer_by
        if slots < 1 or not model.is_on(candidate.spec):
            continue
        sized = sizer.sized(candidate, slots)
        if not fits(sized.need, room):
            continue
        if snapshot.engines[candidate.spec.engine].slots(model, sized.candidate.spec) == slots:
            found.append(sized)
    return found


def _among(snapshot: Snapshot, group: Sequence[SizedCandidate], request: PlacementRequest) -> Decision:
    """One of the candidates that could hold it, or what is waited for."""
    failures = {c.name: f for c in group if (f := _failure(snapshot, c, request)) is not None}
    if len(failures) == len(group):
        last = failures[group[-1].name]
        if last.is_lost and group[-1].candidate.spec.attached:  # it is gone, and nobody knows yet
            return NoFit("no_instance", f"{last.instance} is gone: {last.message}")
        return NoFit("load_failed", last.message, last.status)
    out = request.not_on | failures.keys() | _just_lost(snapshot, request) | snapshot.ejected
    there = [c for c in group if c.name not in out and _is_up(snapshot, c)]
    usable_gpus = [c for c in there if may_use(snapshot, c.candidate.gpus)]
    if there and not usable_gpus:
        return MustWait("waits until a GPU that is back has shown with a load on it alone that it works")
    there = usable_gpus
    preferred = _preferred_start(snapshot, [c for c in group if c.name not in out], there, request)
    if preferred is not None:
        return MustWait(f"{preferred.name}: waits for its start, since the configuration prefers its GPUs")
    usable = [c for c in there if not _in_transit(snapshot, c, request)]
    now = _fits_now(snapshot, usable, request)
    if now is not None:
        return now
    dear = _offers(snapshot, usable, request, busy=False)
    offers = [o for o in dear if o.leaving.price <= request.price_max]
    if offers:
        return _taken(snapshot, min(offers, key=lambda o: _offer_rank(snapshot, o, request)), request)
    if dear:
        return _too_dear(
            snapshot, min(dear, key=lambda o: (o.leaving.price, o.leaving.lost_bytes, o.sized.name)), request
        )
    return _wait(snapshot, there, request)


def _is_up(snapshot: Snapshot, sized: SizedCandidate) -> bool:
    """An instance that would be started for it counts; one that is coming is waited for."""
    view = snapshot.instances.get(sized.name)
    return sized.candidate.is_new or (view is not None and (view.state is InstanceState.READY or view.spec.on_demand))


def _preferred_start(
    snapshot: Snapshot,
    sized_candidates: Sequence[SizedCandidate],
    there: Sequence[SizedCandidate],
    request: PlacementRequest,
) -> SizedCandidate | None:
    """An instance that is starting and that the configuration prefers to all that are up; None where there is none."""
    if not there or not (snapshot.policy.exclusive_gpus or snapshot.policy.pins):
        return None
    name = request.model.name
    least = min(against_preferences(snapshot, c.candidate.gpus, name) for c in there)
    return next(
        (
            c
            for c in sized_candidates
            if not c.candidate.is_new
            and snapshot.instances[c.name].state is InstanceState.STARTING
            and against_preferences(snapshot, c.candidate.gpus, name) < least
            and fits(c.need, free_room(snapshot))
        ),
        None,
    )


def _in_transit(snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest) -> bool:
    """True where this very model is on its way in or out of the instance, or busy there with other options."""
    here = snapshot.residencies.get((sized.name, request.model.blob))
    return here is not None and not here.is_idle


def _fits_now(
    snapshot: Snapshot, sized_candidates: Sequence[SizedCandidate], request: PlacementRequest
) -> Placed | None:
    room = free_room(snapshot)
    free = [
        c for c in sized_candidates if fits(c.need, room) and (c.name, request.model.blob) not in snapshot.residencies
    ]
    if not free:
        return None
    best = min(free, key=lambda c: _preference(snapshot, c, request))
    name, gpus = request.model.name, best.candidate.gpus
    preferred = "; exclusive to it" if gpus and all(is_exclusive_to(snapshot, gpu, name) for gpu in gpus) else ""
    return _placed(best, (), f"{best.name}: {explain_fit(snapshot, best.need)}{preferred}", request)


def _placed(sized: SizedCandidate, evict: tuple[ResidencyKey, ...], reason: str, request: PlacementRequest) -> Placed:
    candidate = sized.candidate
    return Placed(
        candidate.spec.name, sized.need, evict, reason, request.options, candidate.spec if candidate.is_new else None
    )


def _offer_rank(snapshot: Snapshot, offer: _Offer, request: PlacementRequest) -> tuple[float, int, int, _Preference]:
    """The cheapest first; at one price as configured, then by what is lost."""
    preference = _preference(snapshot, offer.sized, request)
    return (offer.leaving.price, preference[0], offer.leaving.lost_bytes, preference)


def _preference(snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest) -> _Preference:
    """Where there is a choice: as configured, not where others wait to be put, least busy GPUs, least filled, the
    faster, those with the faster links, the roomier, and an instance that runs already; then by name."""
    gpus = set(sized.candidate.gpus)
    keys = dict.fromkeys(residencies_of(snapshot, sized.name))
    for gpu in gpus:
        keys.update(dict.fromkeys(residencies_on(snapshot, gpu)))
    mates = [snapshot.residencies[key] for key in keys]
    speed = sum((snapshot.gpus[g].bandwidth_bytes_per_second or 0.0) for g in gpus if g in snapshot.gpus)
    link = min((snapshot.gpus[g].link_bytes_per_second or 0.0 for g in gpus if g in snapshot.gpus), default=0.0)
    room = sum(available_bytes(snapshot, g) for g in gpus)
    packed = _packing(snapshot, sized)
    busy = 0 if packed else sum(r.in_flight for r in mates)
    against = against_preferences(snapshot, sized.candidate.gpus, request.model.name)
    return (against, packed, busy, len(mates), -speed, -link, -room, int(sized.candidate.is_new), sized.name)


def _packing(snapshot: Snapshot, sized: SizedCandidate) -> int:
    """Bytes that stay free on the GPU, or 0 unless a model over several GPUs was requested recently: small models then
    fill up GPUs and leave others empty for it."""
    if len(sized.candidate.gpus) != 1 or not snapshot.large_model_requested:
        return 0
    gpu, size = sized.need[0]
    return max(1, available_bytes(snapshot, gpu) - size)


def _offers(
    snapshot: Snapshot, sized_candidates: Sequence[SizedCandidate], request: PlacementRequest, *, busy: bool
) -> list[_Offer]:
    """The candidates for which enough models could leave, each with those that cost least, at any price."""
    young, blob = request.may_evict_young, request.model.blob
    most = most_room(snapshot, busy=busy, young=young)
    with_replica = {r.instance for r in replicas_of(snapshot, blob)}
    found: list[_Offer] = []
    for sized in sized_candidates:
        if request.supersedes or sized.name in with_replica:
            leaving = departures(snapshot, sized.need, (sized.name, blob), request.supersedes, busy=busy, young=young)
        elif fits(sized.need, most):
            leaving = common_departures(snapshot, sized.need, busy=busy, young=young)
        else:
            continue
        if leaving is not None:
            found.append(_Offer(sized, leaving))
    return found


def _too_dear(snapshot: Snapshot, offer: _Offer, request: PlacementRequest) -> MustWait:
    """Idle models could leave, but that would cost others more than the wait is worth so far."""
    names = ", ".join(snapshot.residencies[key].name for key in offer.leaving.evict)
    price = offer.leaving.price
    words = f"to unload {names} would cost others {price:.0f} s, and the wait is worth {request.price_max:.0f} s yet"
    return MustWait(f"{offer.sized.name}: {words}", price=price, too_dear=offer.leaving.evict)


def _taken(snapshot: Snapshot, offer: _Offer, request: PlacementRequest) -> Placed:
    names = ", ".join(snapshot.residencies[key].name for key in offer.leaving.evict)
    how = f"after unloading {names}" if offer.leaving.evict else "once freed memory shows"
    return _placed(offer.sized, offer.leaving.evict, f"{offer.sized.name}: fits {how}", request)


def _wait(
    snapshot: Snapshot, sized_candidates: Sequence[SizedCandidate], request: PlacementRequest
) -> Placed | MustWait:
    """Busy models stand in the way: the offer with the least to wait for and to lose, taken or only named."""
    at_rest = [c for c in sized_candidates if _own_state(snapshot, c, request) in (None, ResidencyState.READY)]
    dear = _offers(snapshot, at_rest, request, busy=True)
    offers = [o for o in dear if o.leaving.price <= request.price_max] or dear
    if not offers:
        return MustWait(
            explain_obstacles(snapshot, [gpu for c in sized_candidates for gpu, _ in c.need], request.model)
        )
    best = min(offers, key=lambda o: (o.leaving.price + o.leaving.drain_seconds, o.leaving.running, o.sized.name))
    price, evict = best.leaving.price, best.leaving.evict
    words = f"waits for {best.leaving.running} running requests of {len(evict)} models to make room"
    if price > request.price_max:
        words += f", which would cost others {price:.0f} s, and the wait is worth {request.price_max:.0f} s yet"
    elif request.may_drain:
        return _placed(best.sized, evict, f"{best.sized.name}: {words}", request)
    return MustWait(f"{best.sized.name}: {words}", evict)


def _own_state(snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest) -> ResidencyState | None:
    """State of the model's replica there: a loading one serves others first, and an unloading one is waited for."""
    here = snapshot.residencies.get((sized.name, request.model.blob))
    return None if here is None else here.state


def _failure(snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest) -> Failure | None:
    """Why this load is not tried there again."""
    if not snapshot.failures:
        return None
    gpus = frozenset(sized.candidate.gpus)
    found = [
        f
        for f in snapshot.failures
        if (f.blob, f.options) == (request.model.blob, request.options)
        and (f.instance == sized.name or (f.is_spilled and frozenset(gpus_of(snapshot, f.instance)) == gpus))
    ]
    if len(found) == 1 and (found[0].is_lost or (found[0].is_spilled and request.repeats_spill)):
        return None
    return found[-1] if found else None


def _spilled_once(snapshot: Snapshot, group: Sequence[SizedCandidate], request: PlacementRequest) -> bool:
    """Returns True where all of these have failed, and one of them because the load spilled, the only one that did."""
    spilled = [f for f in snapshot.failures if f.blob == request.model.blob and f.is_spilled]
    failures = [_failure(snapshot, c, request) for c in group] if len(spilled) == 1 else []
    return bool(failures) and None not in failures and spilled[0] in failures


def _just_lost(snapshot: Snapshot, request: PlacementRequest) -> set[InstanceName]:
    """Instances whose server was lost with a load of these weights so lately that nothing is known of it yet."""
    since, blob = snapshot.now - _LOST_SECONDS, request.model.blob
    return {f.instance for f in snapshot.failures if f.is_lost and f.blob == blob and f.at > since}


def _nowhere(snapshot: Snapshot, sized_candidates: Sequence[SizedCandidate], request: PlacementRequest) -> Decision:
    """409 or 422, unless memory is still settling that would be enough."""
    if any(_may_hold_soon(snapshot, sized) for sized in sized_candidates):
        return MustWait("waits until the GPUs show what the last load or unload changed")
    lines = [f"{c.name}: {explain_shortfall(snapshot, c.need)}" for c in _fewest_lines(sized_candidates)]
    if request.layout is not None and lines:
        words = f"model '{request.model.name}' does not fit as asked ({_layout_words(request.layout)}): " + "; ".join(
            lines
        )
        return NoFit("layout_unavailable", words)
    if not lines:
        if request.layout is not None:
            words = f"no running instance is laid out as asked ({_layout_words(request.layout)})"
            return NoFit("layout_unavailable", words)
        words = f"no running instance may load model '{request.model.name}': "
        return NoFit("no_instance", words + explain_states(snapshot))
    return NoFit("model_too_large", f"model '{request.model.name}' fits nowhere: " + "; ".join(lines))


def _may_hold_soon(snapshot: Snapshot, sized: SizedCandidate) -> bool:
    """Whether all that it lacks is on GPUs that may have more than their last reading shows."""
    room = capacities(snapshot)
    return all(
        room.get(gpu, 0) >= size or (is_settling(snapshot, gpu) and nominal_bytes(snapshot, gpu) >= size)
        for gpu, size in sized.need
    )


def _layout_words(layout: Layout) -> str:
    return layout.kind.value if layout.gpu is None else f"{layout.kind.value}:{layout.gpu}"


def _fewest_lines(sized_candidates: Sequence[SizedCandidate]) -> list[SizedCandidate]:
    """Enough to see why: of many sets of one size only those of running instances, or else the first."""
    running = [c for c in sized_candidates if not c.candidate.is_new]
    return running or list(sized_candidates[:8])


# --- for people -------------------------------------------------------------------------------------------------


def survey(snapshot: Snapshot, estimate: Estimate, request: PlacementRequest) -> list[CandidateReport]:
    """Every candidate as `place` sees it, smallest sets first, and the running instances that rules exclude."""
    model = request.model
    bounds = _bounds(snapshot, request)
    reports: list[CandidateReport] = []
    sizer = Sizer(snapshot, estimate, model, request.options)
    is_held = False
    for size in sizes(snapshot):
        candidates = _that_may_load(snapshot, candidates_of_size(snapshot, size, bounds), model)
        sized_candidates = [_candidate(snapshot, sizer, candidate, request, False) for candidate in candidates]
        reports += [_report(snapshot, sized, request, is_larger=is_held) for sized in sized_candidates]
        is_held = is_held or any(fits(c.need, capacities(snapshot)) for c in sized_candidates)
    surveyed = {report.instance for report in reports}
    return reports + [
        CandidateReport(view.spec.name, view.spec.gpus, Verdict.EXCLUDED, _exclusion(snapshot, bounds, view.spec))
        for view in snapshot.instances.values()
        if view.spec.name not in surveyed and model.is_on(view.spec) and not bounds.allows(snapshot, view.spec.gpus)
    ]


def _report(
    snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest, *, is_larger: bool
) -> CandidateReport:
    verdict, reason, offer = _verdict(snapshot, sized, request, is_larger=is_larger)
    return CandidateReport(
        sized.name,
        sized.candidate.gpus,
        verdict,
        reason,
        is_new=sized.candidate.is_new,
        per_gpu_bytes=tuple(size for _, size in sized.need),
        evict=offer.leaving.evict if offer is not None else (),
        price_seconds=0.0 if verdict is Verdict.FREE else offer.leaving.price if offer is not None else None,
        slots=snapshot.engines[sized.candidate.spec.engine].slots(request.model, sized.candidate.spec),
    )


def _verdict(
    snapshot: Snapshot, sized: SizedCandidate, request: PlacementRequest, *, is_larger: bool
) -> tuple[Verdict, str, _Offer | None]:
    if not fits(sized.need, capacities(snapshot)):
        return Verdict.TOO_SMALL, explain_shortfall(snapshot, sized.need), None
    failure = _failure(snapshot, sized, request)
    if failure is not None:
        return Verdict.FAILED, failure.message, None
    if is_larger:
        return Verdict.LARGER, "a smaller set of GPUs can hold it", None
    if not _is_up(snapshot, sized):
        return Verdict.NOT_READY, explain_state(snapshot.instances[sized.name]), None
    if sized.name in request.not_on or _in_transit(snapshot, sized, request):
        return Verdict.HAS_MODEL, "the model is there, or on its way in or out", None
    if _fits_now(snapshot, [sized], request) is not None:
        return Verdict.FREE, explain_fit(snapshot, sized.need), None
    for offer in _offers(snapshot, [sized], request, busy=False):
        if offer.leaving.price <= request.price_max:
            return Verdict.EVICT, _taken(snapshot, offer, request).reason.partition(": ")[2], offer
        return Verdict.TOO_DEAR, _too_dear(snapshot, offer, request).reason.partition(": ")[2], offer
    for offer in _offers(snapshot, [sized], request, busy=True):
        names = ", ".join(snapshot.residencies[key].name for key in offer.leaving.evict)
        return Verdict.BUSY, f"{offer.leaving.running} requests run on what is in the way: {names}", offer
    return Verdict.BLOCKED, "its memory is held by loads under way, or by models that stay", None


def _exclusion(snapshot: Snapshot, bounds: Bounds, spec: InstanceSpec) -> str:
    if bounds.layout is not None and not bounds.layout.allows(spec.gpus):
        return f"the request asks for another layout ({_layout_words(bounds.layout)})"
    if any(bounds.name not in snapshot.policy.exclusive_gpus.get(gpu, (bounds.name,)) for gpu in spec.gpus):
        return "its GPUs are exclusive to other models (placement.exclusive_gpus)"
    return "the model is pinned elsewhere (models.NAME.gpus or .layout)"
