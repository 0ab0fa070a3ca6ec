"""Ejection: a replica or an instance that fails requests takes no new one for a while, if others can serve them.

Two rules eject: several failures in a row, and a high share of failures. An instance is judged by what was lost or
timed out there, a replica also by errors (status 500 and above). An answer that it is overloaded, which may come at
once, only holds requests back briefly: otherwise the replica that answers fastest would get them all. When the time is
over, one real request is let through. If it succeeds, all are; if not, the next ejection lasts twice as long.

The last replica of a model and the last instance are never ejected. Pure but for `FleetState.health`.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import Action, Notice
from router.domain.events import Released
from router.domain.health import Health, ReplyFailure
from router.domain.instance import InstanceName, InstanceState
from router.domain.request import TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import HealthKey
from router.scheduler.state import FleetState

_CONSECUTIVE_MAX = 5
"""Failures of a replica in a row that eject it: fewer may be one client's requests."""
_CONSECUTIVE_LOST_MAX = 3
"""Requests lost or timed out in a row that eject an instance: each of them has cost a model or a connection already."""
_FAILED_SHARE_MAX = 0.5
_REQUESTS_MIN = 10.0
"""The share counts from this many requests on."""
_HALF_LIFE_SECONDS = 30.0
_FIRST_SECONDS = 10.0
_LONGEST_SECONDS = 300.0
_OVERLOADED_SECONDS = 1.0
_FORGIVEN_SECONDS = 300.0
"""After this long without an ejection the next one is short again."""


def observe(fleet: FleetState, event: Released, key: ResidencyKey, now: float) -> list[Action]:
    """Counts how a request ended. Call it while the lease's replica may still exist."""
    _end_probe(fleet, event.ticket_id)
    failure = event.failure
    if failure is not None:
        judged: list[HealthKey] = [key]
        if failure in (ReplyFailure.LOST, ReplyFailure.TIMEOUT):
            judged.append(key[0])
        return [action for each in judged for action in _failed(fleet, each, failure, now)]
    if fleet.health and event.first_byte_at is not None:
        for each in (key, key[0]):
            _succeeded(fleet, each, now)
    return []


def _ejected_replicas(fleet: FleetState, now: float) -> frozenset[ResidencyKey]:
    """Replicas that take no request now. One is left to each model."""
    refusing = {key for key, replica in fleet.replicas.items() if _refuses(fleet, key, replica, now)}
    return frozenset(key for key in refusing if _has_other(fleet, key, refusing))


def _ejected_instances(fleet: FleetState, now: float) -> frozenset[InstanceName]:
    """Instances on which nothing is loaded now, if another one is ready."""
    names = {
        name
        for name, found in fleet.health.items()
        if not isinstance(name, tuple) and now < found.ejected_until and name in fleet.instances
    }
    if not names or all(v.state is not InstanceState.READY or n in names for n, v in fleet.instances.items()):
        return frozenset()
    return frozenset(names)


def granted(fleet: FleetState, key: ResidencyKey, ticket_id: TicketId) -> None:
    """The ticket got a slot there: where a replica or instance has to show that it is well, this is its one request."""
    for each in (key, key[0]):
        found = fleet.health.get(each)
        if found is not None and found.is_half_open and found.probe is None:
            fleet.health[each] = replace(found, probe=ticket_id)
            # Until the next event decides anew: the ticket after this one must not go there as well.
            fleet.set_draining(fleet.draining | {k for k in fleet.replicas if each in (k, k[0])})
            fleet.version += 1


def apply(fleet: FleetState, now: float) -> frozenset[ResidencyKey]:
    """Updates which instances are ejected, and when that ends. Returns the replicas that take no request now."""
    if not fleet.health:
        fleet.set_ejected(frozenset())
        fleet.ejection_ends_at = None
        return frozenset()
    fleet.set_ejected(_ejected_instances(fleet, now))
    fleet.ejection_ends_at = min(
        (h.ejected_until for h in fleet.health.values() if h.ejected_until > now), default=None
    )
    return _ejected_replicas(fleet, now)


def _refuses(fleet: FleetState, key: ResidencyKey, replica: Residency, now: float) -> bool:
    if replica.state is not ResidencyState.READY:
        return False
    return any((found := fleet.health.get(each)) is not None and found.refuses(now) for each in (key, key[0]))


def _has_other(fleet: FleetState, key: ResidencyKey, refusing: set[ResidencyKey]) -> bool:
    return any(
        other[1] == key[1]
        and other not in refusing
        and replica.state is ResidencyState.READY
        and fleet.instances[other[0]].state is InstanceState.READY
        for other, replica in fleet.replicas.items()
        if other != key
    )


def _end_probe(fleet: FleetState, ticket_id: TicketId) -> None:
    """A probe whose client left has shown nothing: the next request is one."""
    for each, found in list(fleet.health.items()):
        if found.probe == ticket_id:
            fleet.health[each] = replace(found, probe=None)
            fleet.version += 1


def _failed(fleet: FleetState, key: HealthKey, failure: ReplyFailure, now: float) -> list[Action]:
    before = _decayed(fleet.health.get(key, Health(at=now)), now)
    if failure is ReplyFailure.OVERLOADED:
        fleet.health[key] = replace(before, ejected_until=max(before.ejected_until, now + _OVERLOADED_SECONDS))
        fleet.version += 1
        return []
    found = replace(
        before,
        consecutive_failures=before.consecutive_failures + 1,
        failures=before.failures + 1.0,
        requests=before.requests + 1.0,
    )
    fleet.health[key] = found
    if before.is_half_open and now < before.ejected_until:
        return []  # a request that began before the ejection shows nothing new
    if isinstance(key, tuple) and not _has_other(fleet, key, set()):
        return []
    reason = _reason(key, found, failure)
    return [] if reason is None else [_eject(fleet, key, found, failure, reason, now)]


def _reason(key: HealthKey, found: Health, failure: ReplyFailure) -> str | None:
    """Why it is ejected now; None if it is not."""
    most = _CONSECUTIVE_MAX if isinstance(key, tuple) else _CONSECUTIVE_LOST_MAX
    if found.is_half_open:
        return f"failed again ({failure})"
    if found.consecutive_failures >= most:
        return f"failed {found.consecutive_failures} requests in a row, the last: {failure}"
    if found.requests >= _REQUESTS_MIN and found.failures / found.requests >= _FAILED_SHARE_MAX:
        return f"failed {found.failures / found.requests:.0%} of its requests, the last: {failure}"
    return None


def _eject(fleet: FleetState, key: HealthKey, found: Health, failure: ReplyFailure, reason: str, now: float) -> Notice:
    count = 1 if now - found.ejected_until > _FORGIVEN_SECONDS else found.ejections + 1
    seconds = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0 ** (count - 1))
    fleet.health[key] = Health(at=now, ejections=count, ejected_until=now + seconds, is_half_open=True, reason=reason)
    fleet.version += 1
    instance, blob = key if isinstance(key, tuple) else (key, None)
    model = next((r.name for k, r in fleet.replicas.items() if k == (instance, blob)), "")
    fields = {"instance": instance, "model": model, "cause": failure.value, "reason": reason, "seconds": seconds}
    return Notice("ejected", fields)


def _succeeded(fleet: FleetState, key: HealthKey, now: float) -> None:
    found = fleet.health.get(key)
    if found is None or now < found.ejected_until:
        return  # a request that began before the ejection shows nothing
    if found.is_half_open:
        fleet.version += 1
    after = _decayed(found, now)
    if after.failures < 0.5 and now - after.ejected_until > _FORGIVEN_SECONDS:
        del fleet.health[key]
        return
    fleet.health[key] = replace(after, consecutive_failures=0, requests=after.requests + 1.0, is_half_open=False)


def _decayed(found: Health, now: float) -> Health:
    kept = 0.5 ** ((now - found.at) / _HALF_LIFE_SECONDS)
    return replace(found, failures=found.failures * kept, requests=found.requests * kept, at=now)
