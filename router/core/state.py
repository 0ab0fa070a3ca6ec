"""What the dispatcher remembers: cards, instances, residencies, reservations, leases, demand, failures.

Frozen values in dictionaries, replaced whole. Only the dispatcher changes them; deciding functions get a `Snapshot`
of read-only views.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from router.core import demand
from router.core.entities import (
    BlobDigest,
    Demand,
    Failure,
    Gpu,
    GpuUuid,
    InstanceName,
    InstanceView,
    LoadId,
    ModelFacts,
    Policy,
    Reservation,
    Residency,
    ResidencyKey,
    ResidencyState,
    Snapshot,
    Ticket,
    TicketId,
)
from router.core.ledger import is_settled

_SESSIONS_MAX = 10_000
_MODELS_MAX = 1_000
_NEW_SHARE = 0.3
"""Of the newest load in the mean rate of loads."""


def expiry(keep_alive_seconds: float, now: float) -> float | None:
    """When a model that is idle from now on is to leave; None for never."""
    return None if keep_alive_seconds < 0 else now + keep_alive_seconds


class LeaseRecord(NamedTuple):
    """One slot that is held."""

    key: ResidencyKey
    loaded_at: float
    """Of the copy: one that came to the same place after it has nothing to do with this slot."""
    client: str
    granted_at: float


@dataclass(slots=True)
class FleetState:
    """Mutable, single owner. `version` grows with every change that could let a waiting ticket go on."""

    policy: Policy
    gpus: dict[GpuUuid, Gpu] = field(default_factory=dict[GpuUuid, Gpu])
    gpus_read_at: float = float("-inf")
    changed_at: float = float("-inf")
    instances: dict[InstanceName, InstanceView] = field(default_factory=dict[InstanceName, InstanceView])
    residencies: dict[ResidencyKey, Residency] = field(default_factory=dict[ResidencyKey, Residency])
    reservations: dict[LoadId, Reservation] = field(default_factory=dict[LoadId, Reservation])
    leases: dict[TicketId, LeaseRecord] = field(default_factory=dict[TicketId, LeaseRecord])
    draining: frozenset[ResidencyKey] = frozenset()
    failures: list[Failure] = field(default_factory=list[Failure])
    demand: dict[BlobDigest, Demand] = field(default_factory=dict[BlobDigest, Demand])
    models: dict[BlobDigest, ModelFacts] = field(default_factory=dict[BlobDigest, ModelFacts])
    """Facts of models that were asked for, by the name last used."""
    sessions: dict[tuple[str, BlobDigest], InstanceName] = field(
        default_factory=dict[tuple[str, BlobDigest], InstanceName]
    )
    """Where each conversation was served last."""
    wanted: dict[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])
    large_blobs: set[BlobDigest] = field(default_factory=set[BlobDigest])
    """Models that no single card holds."""
    load_rate_bytes_per_second: float | None = None
    emptied_at: dict[InstanceName, float] = field(default_factory=dict[InstanceName, float])
    """When an instance started on demand was first seen empty."""
    version: int = 0

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            now=now,
            policy=self.policy,
            gpus=MappingProxyType(self.gpus),
            gpus_read_at=self.gpus_read_at,
            instances=MappingProxyType(self.instances),
            residencies=MappingProxyType(self.residencies),
            reservations=MappingProxyType(self.reservations),
            changed_at=self.changed_at,
            failures=tuple(self.failures),
            draining=self.draining,
            demand=MappingProxyType(self.demand),
            wanted=MappingProxyType(self.wanted),
            large_asked=self._large_asked(now),
            load_rate_bytes_per_second=self.load_rate_bytes_per_second,
        )

    def _large_asked(self, now: float) -> bool:
        horizon = 4 * self.policy.demand_half_life_seconds
        return any(now - self.demand[blob].at < horizon for blob in self.large_blobs if blob in self.demand)

    # --- residencies ---------------------------------------------------------------------------------------

    def update(self, key: ResidencyKey, **changes: Any) -> Residency:
        residency = replace(self.residencies[key], **changes)
        self.residencies[key] = residency
        self.version += 1
        return residency

    def forget(self, key: ResidencyKey) -> None:
        """Drops a residency and what hangs on it. Leases stay: their requests end in their own time."""
        residency = self.residencies.pop(key, None)
        self.version += 1
        if residency is not None and residency.load_id is not None:
            self.reservations.pop(residency.load_id, None)

    def forget_instance(self, name: InstanceName) -> None:
        for key in [k for k in self.residencies if k[0] == name]:
            self.forget(key)

    def by_load(self, load_id: LoadId) -> Residency | None:
        return next((r for r in self.residencies.values() if r.load_id == load_id), None)

    def settle(self) -> None:
        """Lets go of reservations and unloaded models that the newest reading of the cards already reflects."""
        for load_id, reservation in list(self.reservations.items()):
            if is_settled(reservation, self.gpus_read_at):
                del self.reservations[load_id]
        for key, residency in list(self.residencies.items()):
            ended = residency.unloaded_at
            if ended is not None and (self.gpus_read_at > ended or not residency.per_gpu_bytes):
                self.forget(key)

    # --- memory of what happened ---------------------------------------------------------------------------

    def forget_failures(self, now: float) -> None:
        if self.failures:
            horizon = now - self.policy.failure_memory_seconds
            self.failures = [f for f in self.failures if f.at > horizon]

    def asked(self, ticket: Ticket, now: float) -> None:
        """Counts a request for its model."""
        blob = ticket.model.blob
        self.models[blob] = ticket.model
        before = self.demand.get(blob, Demand(at=now))
        self.demand[blob] = demand.asked(before, now, self.policy.demand_half_life_seconds)
        if len(self.demand) > _MODELS_MAX:
            coldest = min(self.demand, key=lambda known: (self.demand[known].at, known))
            del self.demand[coldest]
            self.models.pop(coldest, None)

    def loaded(self, weights_bytes: int, seconds: float) -> None:
        """A load of so many bytes took so long: the mean rate follows."""
        rate = weights_bytes / max(0.1, seconds - self.policy.load_fixed_seconds / 2)
        before = self.load_rate_bytes_per_second
        self.load_rate_bytes_per_second = rate if before is None else before + _NEW_SHARE * (rate - before)

    # --- slots ---------------------------------------------------------------------------------------------

    def take_slot(self, ticket: Ticket, key: ResidencyKey, now: float) -> None:
        residency = self.residencies[key]
        self.leases[ticket.id] = LeaseRecord(key, residency.loaded_at, ticket.client, now)
        self.residencies[key] = replace(residency, in_flight=residency.in_flight + 1, used_at=now, expires_at=None)
        if ticket.session:
            self.sessions.pop((ticket.session, key[1]), None)
            self.sessions[ticket.session, key[1]] = key[0]
            if len(self.sessions) > _SESSIONS_MAX:
                del self.sessions[next(iter(self.sessions))]

    def give_back(self, ticket_id: TicketId, now: float) -> tuple[LeaseRecord, Residency | None] | None:
        """Ends a lease; returns it with the residency it was on where that still stands."""
        lease = self.leases.pop(ticket_id, None)
        if lease is None:
            return None
        blob = lease.key[1]
        if blob in self.demand:
            self.demand[blob] = demand.served(self.demand[blob], now - lease.granted_at)
        residency = self.residencies.get(lease.key)
        if residency is None or residency.loaded_at != lease.loaded_at:
            return lease, None
        changes: dict[str, Any] = {"in_flight": residency.in_flight - 1, "used_at": now}
        if residency.in_flight == 1 and residency.state is ResidencyState.READY:
            changes["expires_at"] = expiry(residency.keep_alive_seconds, now)
        return lease, self.update(lease.key, **changes)
