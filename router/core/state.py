"""What the dispatcher remembers: cards, instances, residencies, reservations, leases, failures.

Frozen values in dictionaries, replaced whole. Only the dispatcher changes them; deciding functions get a `Snapshot`
of read-only views.

What every request changes, the use of a copy's slots, is noted beside (`Use`) and written into the residencies when
they are next looked at: a frozen value of twenty fields for each request and each answer would be the dearest thing
that a request does. Nobody outside sees the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from router.core.entities import (
    Failure,
    Gpu,
    GpuUuid,
    InstanceName,
    InstanceView,
    LoadId,
    Policy,
    Reservation,
    Residency,
    ResidencyKey,
    ResidencyState,
    Snapshot,
    TicketId,
)
from router.core.ledger import is_settled


def expiry(keep_alive_seconds: float, now: float) -> float | None:
    """When a model that is idle from now on is to leave; None for never."""
    return None if keep_alive_seconds < 0 else now + keep_alive_seconds


@dataclass(slots=True)
class Use:
    """How a copy is used, where that is newer than its residency."""

    in_flight: int
    used_at: float
    expires_at: float | None
    keep_alive_seconds: float


@dataclass(slots=True)
class FleetState:
    """Mutable, single owner."""

    policy: Policy
    gpus: dict[GpuUuid, Gpu] = field(default_factory=dict[GpuUuid, Gpu])
    gpus_read_at: float = float("-inf")
    changed_at: float = float("-inf")
    instances: dict[InstanceName, InstanceView] = field(default_factory=dict[InstanceName, InstanceView])
    copies: dict[ResidencyKey, Residency] = field(default_factory=dict[ResidencyKey, Residency])
    """The residencies, but for what `uses` says of them: for who knows that, else see `residencies`."""
    uses: dict[ResidencyKey, Use] = field(default_factory=dict[ResidencyKey, Use])
    reservations: dict[LoadId, Reservation] = field(default_factory=dict[LoadId, Reservation])
    leases: dict[TicketId, ResidencyKey] = field(default_factory=dict[TicketId, ResidencyKey])
    draining: set[ResidencyKey] = field(default_factory=set[ResidencyKey])
    failures: list[Failure] = field(default_factory=list[Failure])
    wake: tuple[float | None] | None = None
    """When time alone changes something next, if ever; None while that has to be worked out."""

    @property
    def residencies(self) -> dict[ResidencyKey, Residency]:
        """As they are now; may be changed."""
        if self.uses:
            for key, use in self.uses.items():
                self.copies[key] = replace(
                    self.copies[key],
                    in_flight=use.in_flight,
                    used_at=use.used_at,
                    expires_at=use.expires_at,
                    keep_alive_seconds=use.keep_alive_seconds,
                )
            self.uses.clear()
        return self.copies

    def use_of(self, key: ResidencyKey) -> Use:
        """How the copy is used, to be changed."""
        use = self.uses.get(key)
        if use is None:
            copy = self.copies[key]
            use = self.uses[key] = Use(copy.in_flight, copy.used_at, copy.expires_at, copy.keep_alive_seconds)
        return use

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
            draining=frozenset(self.draining),
        )

    def update(self, key: ResidencyKey, **changes: Any) -> Residency:
        residency = replace(self.residencies[key], **changes)
        self.residencies[key] = residency
        return residency

    def forget(self, key: ResidencyKey) -> None:
        """Drops a residency and what hangs on it, leases too: their requests end in their own time, and what they give
        back then is no slot of a copy that was loaded there since."""
        residency = self.residencies.pop(key, None)
        self.draining.discard(key)
        self.leases = {ticket: leased for ticket, leased in self.leases.items() if leased != key}
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

    def forget_failures(self, now: float) -> None:
        horizon = now - self.policy.failure_memory_seconds
        self.failures = [f for f in self.failures if f.at > horizon]

    def take_slot(self, ticket_id: TicketId, key: ResidencyKey, now: float) -> Residency:
        self.leases[ticket_id] = key
        return self.update(key, in_flight=self.residencies[key].in_flight + 1, used_at=now, expires_at=None)

    def give_back(self, ticket_id: TicketId, now: float) -> Residency | None:
        """Ends a lease; returns the residency it was on where that still stands."""
        key = self.leases.pop(ticket_id, None)
        residency = self.residencies.get(key) if key is not None else None
        if key is None or residency is None:
            return None
        changes: dict[str, Any] = {"in_flight": residency.in_flight - 1, "used_at": now}
        if residency.in_flight == 1 and residency.state is ResidencyState.READY:
            changes["expires_at"] = expiry(residency.keep_alive_seconds, now)
        return self.update(key, **changes)
