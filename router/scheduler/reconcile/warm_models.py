"""Models with `keep_warm`: loaded before anything else, and reported where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from router.domain.actions import Action, Notice
from router.domain.ids import LoadId
from router.domain.model import ModelFacts
from router.domain.residency import ResidencyState
from router.domain.snapshot import Estimate
from router.scheduler.placement.placement import NoFit, Placed
from router.scheduler.reconcile import housekeeping, reservations
from router.scheduler.state import FleetState

_NOT_FOUND = "no server that is running has it"


def begin_loads(fleet: FleetState, estimate: Estimate, new_load_id: Callable[[], LoadId], now: float) -> list[Action]:
    """Plans the loads of all that are missing, and reports those that do not fit."""
    if not fleet.policy.has_warm_pins:
        return []
    actions: list[Action] = []
    refusals: dict[str, NoFit] = {}
    for model in housekeeping.missing_warm(fleet.snapshot(now), fleet.warm_models):
        decision = housekeeping.place_warm(fleet.snapshot(now), estimate, model)
        if isinstance(decision, Placed):
            actions += reservations.begin(fleet, model, decision, new_load_id(), now)
        elif isinstance(decision, NoFit):
            refusals[model.name] = decision
    return actions + list(_report(fleet, refusals))


def _report(fleet: FleetState, refusals: dict[str, NoFit]) -> Iterator[Notice]:
    """Renews what is missing. Each that cannot be loaded is in the log once, until it is loaded."""
    missing: dict[str, str] = {}
    for name, pin in fleet.policy.pins.items():
        if not pin.keep_warm:
            continue
        model = fleet.warm_models.get(name)
        if model is not None and _is_loaded(fleet, model):
            fleet.warm_refusals.pop(name, None)
            continue
        if model is None:
            missing[name] = _NOT_FOUND
            continue
        refusal = refusals.get(name)
        if refusal is not None and name not in fleet.warm_refusals:
            fleet.warm_refusals[name] = refusal.message
            yield Notice("warm_model_missing", {"model": name, "reason": refusal.message})
        missing[name] = fleet.warm_refusals.get(name, "it is not loaded yet")
    fleet.set_warm_missing(missing)


def _is_loaded(fleet: FleetState, model: ModelFacts) -> bool:
    return any(key[1] == model.blob and r.state is ResidencyState.READY for key, r in fleet.replicas.items())


def awaits_discovery(fleet: FleetState, model: ModelFacts, now: float) -> bool:
    """Whether a load of this model waits, because models to be kept warm may be found any moment and go first."""
    policy = fleet.policy
    if not policy.has_warm_pins or fleet.first_ready_at is None:
        return False
    if now - fleet.first_ready_at >= policy.constants.warm_discovery_seconds:
        return False
    if policy.keeps_warm(model.name):
        return False
    return any(pin.keep_warm and name not in fleet.warm_models for name, pin in policy.pins.items())
