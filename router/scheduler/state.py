"""The scheduler's state: GPUs, instances, residencies, reservations, held slots, demand, failures.

Frozen values in dictionaries, replaced whole. Only the dispatcher changes them; deciding functions get a `Snapshot` of
read-only views.

What every request changes, the use of a replica's slots, is kept apart (`ReplicaUse`) and written into the residencies
when they are next read: replacing a frozen value of twenty fields twice per request would be its largest cost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from router.domain.drained import NOTHING_DRAINED, Drained
from router.domain.events import LoadMeasured, Released
from router.domain.footprint import FootprintKey, GpuFootprint, MeasuredFootprint
from router.domain.gpu import Gpu, GpuUuid
from router.domain.health import Health
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceView
from router.domain.keep_alive import FOR_EVER, merged_keep_alive
from router.domain.lasting_memo import LastingMemo
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.domain.reservation import Reservation
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.restart import RollingRestart
from router.domain.snapshot import Demand, Engines, Failure, HealthKey, Snapshot
from router.domain.vram_ledger import is_settled, process_bytes
from router.scheduler.balancing import pending_work
from router.scheduler.balancing.pending_work import PendingWork, WorkShare
from router.scheduler.balancing.prefix_affinity import PrefixAffinity, Turn
from router.scheduler.balancing.throughput import ThroughputModel
from router.scheduler.lru import put
from router.scheduler.placement import demand
from router.scheduler.placement.demand import rate_per_second
from router.scheduler.placement.measured_footprints import Footprints, MeasurementStart
from router.scheduler.queue.fair_share import TokenCounters

_UNASKED_WINDOW_SECONDS = 2500.0
"""Half-life of the bytes that nobody waited for: those of about an hour count."""
_MODELS_MAX = 1_000
_NEW_SHARE = 0.3
"""Weight of the newest load in the mean load rate."""
_PRIOR_BYTES = 8e9
"""The default load rate counts as one load of this size, because a first small load is not representative."""


def expiry(keep_alive_seconds: float, now: float) -> float | None:
    """When a model that is idle from now on expires; None for never."""
    return None if keep_alive_seconds < 0 else now + keep_alive_seconds


class LeaseRecord(NamedTuple):
    """One slot in use."""

    key: ResidencyKey
    loaded_at: float
    """Load time of the replica, which tells it from one loaded later on the same instance."""
    client: str
    granted_at: float
    turn: Turn | None = None
    share: WorkShare | None = None
    """None if the model had only one replica."""


class Silence(NamedTuple):
    """What clients of one replica that gave up have seen since its last response."""

    seconds: float
    until: float
    """What is counted ends here."""


def _memory(gpu: Gpu) -> tuple[int, int, str | None]:
    return gpu.memory_free_bytes, gpu.memory_used_bytes, gpu.error


@dataclass(slots=True)
class ReplicaUse:
    """Current use of a replica; newer than the same fields of its residency."""

    in_flight: int
    used_at: float
    expires_at: float | None
    keep_alive_seconds: float


@dataclass(slots=True)
class FleetState:
    """The whole state. Mutable, owned by the dispatcher. `version` grows with changes that may help a waiting ticket.

    Every change of a value that snapshots contain must either increase `version` afterwards, or be made by a method of
    this class, which drops the cached snapshot.
    """

    policy: Policy
    engines: Engines
    """The rules of the engines in use, by kind."""
    gpus: dict[GpuUuid, Gpu] = field(default_factory=dict[GpuUuid, Gpu])
    gpus_read_at: float = float("-inf")
    changed_at: float = float("-inf")
    changed_on: dict[GpuUuid, float] = field(default_factory=dict[GpuUuid, float])
    instances: dict[InstanceName, InstanceView] = field(default_factory=dict[InstanceName, InstanceView])
    overflow: frozenset[InstanceName] = frozenset()
    """Instances for CPU overflow."""
    host_free_bytes: int | None = None
    cpu_speeds: dict[BlobDigest, MeasuredSpeed] = field(default_factory=dict[BlobDigest, MeasuredSpeed])
    """Measured speeds of copies on those."""
    replicas: dict[ResidencyKey, Residency] = field(default_factory=dict[ResidencyKey, Residency])
    """The residencies without the newer values in `uses`. Use `residencies` unless you read both."""
    uses: dict[ResidencyKey, ReplicaUse] = field(default_factory=dict[ResidencyKey, ReplicaUse])
    reservations: dict[LoadId, Reservation] = field(default_factory=dict[LoadId, Reservation])
    leases: dict[TicketId, LeaseRecord] = field(default_factory=dict[TicketId, LeaseRecord])
    draining: frozenset[ResidencyKey] = frozenset()
    failures: list[Failure] = field(default_factory=list[Failure])
    demand: dict[BlobDigest, Demand] = field(default_factory=dict[BlobDigest, Demand])
    models: dict[BlobDigest, ModelFacts] = field(default_factory=dict[BlobDigest, ModelFacts])
    """Facts of requested models, with the name that was used last."""
    dismissed: set[BlobDigest] = field(default_factory=set[BlobDigest])
    """Models that clients have unloaded since the last request for them: not loaded again without a request."""
    prefix_affinity: PrefixAffinity = field(default_factory=PrefixAffinity)
    speeds: ThroughputModel = field(default_factory=ThroughputModel)
    works: dict[ResidencyKey, PendingWork] = field(default_factory=dict[ResidencyKey, PendingWork])
    """Pending work of replicas that were chosen among several."""
    wanted: dict[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])
    large_blobs: set[BlobDigest] = field(default_factory=set[BlobDigest])
    """Models that no single GPU holds."""
    _load_means: tuple[float, float] | None = None
    """Mean bytes and seconds of a load; None before the first one."""
    sent_bytes: Demand = field(default_factory=Demand)
    """Bytes of weights sent for loading, decayed."""
    unasked_bytes: Demand = field(default_factory=Demand)
    """Bytes of weights sent for loads that nobody waited for, decayed."""
    troubled_at: dict[frozenset[GpuUuid], float] = field(default_factory=dict[frozenset[GpuUuid], float])
    """When an instance on these GPUs last died or failed to start."""
    warm_models: dict[str, ModelFacts] = field(default_factory=dict[str, ModelFacts])
    """Models with `keep_warm` that a server has, by name."""
    warm_missing: dict[str, str] = field(default_factory=dict[str, str])
    """Those that are not loaded, each with the reason."""
    warm_refusals: dict[str, str] = field(default_factory=dict[str, str])
    """Those of them that were reported as not fitting, each with what was reported."""
    first_ready_at: float | None = None
    """When the first instance was ready."""
    slowest_seconds: dict[ResidencyKey, float] = field(default_factory=dict[ResidencyKey, float])
    """The longest that a request which was answered has held a slot of the replica."""
    silences: dict[ResidencyKey, Silence] = field(default_factory=dict[ResidencyKey, Silence])
    """What clients that gave up have seen of it since it last answered (`reconcile/silence.py`)."""
    lost_since: dict[InstanceName, float] = field(default_factory=dict[InstanceName, float])
    """Since when a GPU of the instance cannot be read."""
    restarts_due: dict[InstanceName, float] = field(default_factory=dict[InstanceName, float])
    """Instances that are drained to be restarted, each with when that ends."""
    spilled: set[ResidencyKey] = field(default_factory=set[ResidencyKey])
    """Replicas that have come to be partly on the CPU after their load (`reconcile/later_spills.py`)."""
    health: dict[HealthKey, Health] = field(default_factory=dict[HealthKey, Health])
    """Of replicas and instances that have failed requests lately (`reconcile/ejection.py`)."""
    ejected: frozenset[InstanceName] = frozenset()
    """Instances on which nothing is loaded now."""
    ejection_ends_at: float | None = None
    """When the next ejection ends."""
    drained: Drained = NOTHING_DRAINED
    """What an operator has taken out of service."""
    gpu_health: dict[GpuUuid, Any] = field(default_factory=dict[GpuUuid, Any])
    """What is remembered of each GPU (`reconcile/gpu_health.py`)."""
    hot: frozenset[GpuUuid] = frozenset()
    hot_instances: frozenset[InstanceName] = frozenset()
    """Instances over a hot GPU."""
    probation: frozenset[GpuUuid] = frozenset()
    tested_in_sets: frozenset[GpuUuid] = frozenset()
    """Those of them that no known model fits on alone."""
    taken_out: set[InstanceName] = field(default_factory=set[InstanceName])
    """Instances that take no new request because of `drained`."""
    rolling: RollingRestart | None = None
    """A restart that an operator requested and that is in progress."""
    emptied_at: dict[InstanceName, float] = field(default_factory=dict[InstanceName, float])
    """Since when an instance started on demand is empty."""
    footprints: Footprints = field(default_factory=Footprints)
    measuring: dict[LoadId, MeasurementStart] = field(default_factory=dict[LoadId, MeasurementStart])
    load_reports: dict[LoadId, tuple[GpuFootprint, ...]] = field(default_factory=dict[LoadId, tuple[GpuFootprint, ...]])
    """What servers' output said of loads that are not settled yet."""
    clients: dict[str, int] = field(default_factory=dict[str, int])
    """Number of slots in use by client."""
    counters: TokenCounters = field(default_factory=TokenCounters)
    wake: tuple[float | None] | None = None
    """When something changes next by time alone, if ever; None while it has to be recomputed."""
    lasting: LastingMemo | None = field(default_factory=LastingMemo)
    """Results that outlive a snapshot; None: every search begins anew."""
    version: int = 0
    _cached: Snapshot | None = None
    """The last snapshot; None after a change of its content."""
    _cached_version: int = -1
    """`version` when the last snapshot was built."""

    @property
    def residencies(self) -> dict[ResidencyKey, Residency]:
        """The current residencies; the dictionary may be changed."""
        if self.uses:
            for key, use in self.uses.items():
                self.replicas[key] = replace(
                    self.replicas[key],
                    in_flight=use.in_flight,
                    used_at=use.used_at,
                    expires_at=use.expires_at,
                    keep_alive_seconds=use.keep_alive_seconds,
                )
            self.uses.clear()
        return self.replicas

    def use_of(self, key: ResidencyKey) -> ReplicaUse:
        """Use of the replica, to be changed by the caller."""
        self._cached = None
        use = self.uses.get(key)
        if use is None:
            replica = self.replicas[key]
            use = self.uses[key] = ReplicaUse(
                replica.in_flight, replica.used_at, replica.expires_at, replica.keep_alive_seconds
            )
        return use

    def snapshot(self, now: float) -> Snapshot:
        """The state as of `now`; the same object as before if neither the time nor the state has changed."""
        cached = self._cached
        if cached is None or cached.now != now or self._cached_version != self.version:
            cached = self._cached = self.build_snapshot(now)
            self._cached_version = self.version
        return cached

    def build_snapshot(self, now: float) -> Snapshot:
        """A new snapshot, without the cache."""
        return Snapshot(
            now=now,
            policy=self.policy,
            gpus=MappingProxyType(self.gpus),
            gpus_read_at=self.gpus_read_at,
            instances=MappingProxyType(self.instances),
            residencies=MappingProxyType(self.residencies),
            reservations=MappingProxyType(self.reservations),
            changed_at=self.changed_at,
            changed_on=MappingProxyType(self.changed_on),
            failures=tuple(self.failures),
            draining=self.draining,
            demand=MappingProxyType(self.demand),
            wanted=MappingProxyType(self.wanted),
            large_model_requested=self._large_model_requested(now),
            load_rate_bytes_per_second=self.load_rate_bytes_per_second,
            loaded_bytes_per_second=rate_per_second(self.sent_bytes, now, self.policy.constants.swap_window_seconds),
            unasked_bytes_per_hour=3600.0 * rate_per_second(self.unasked_bytes, now, _UNASKED_WINDOW_SECONDS),
            host_free_bytes=self.host_free_bytes,
            cpu_speeds=MappingProxyType(self.cpu_speeds),
            troubled=frozenset(self.troubled_at),
            warm_missing=MappingProxyType(self.warm_missing),
            health=MappingProxyType(self.health),
            ejected=self.ejected,
            drained=self.drained,
            hot=self.hot,
            probation=self.probation,
            tested_in_sets=self.tested_in_sets,
            restarts_due=MappingProxyType(self.restarts_due),
            rolling=self.rolling,
            engines=self.engines,
            lasting=self.lasting,
        )

    def _large_model_requested(self, now: float) -> bool:
        horizon = 4 * self.policy.constants.demand_half_life_seconds
        return any(now - self.demand[blob].at < horizon for blob in self.large_blobs if blob in self.demand)

    def read(self, gpus: tuple[Gpu, ...], read_at: float, host_free_bytes: int | None = None) -> None:
        """Replaces the GPUs by a new reading."""
        self._cached = None
        self.host_free_bytes = host_free_bytes
        before, self.gpus = self.gpus, {gpu.uuid: gpu for gpu in gpus}
        self.gpus_read_at = read_at
        if before.keys() != self.gpus.keys() or any(
            _memory(before[uuid]) != _memory(self.gpus[uuid]) for uuid in before
        ):
            self.version += 1

    # --- changes that do not raise `version` themselves ----------------------------------------------------

    def put_instance(self, view: InstanceView) -> None:
        self._cached = None
        self.instances[view.spec.name] = view
        if view.spec.is_overflow:
            self.overflow |= {view.spec.name}

    def set_cpu_speed(self, blob: BlobDigest, speed: MeasuredSpeed) -> None:
        """How fast the model is on the CPU."""
        self._cached = None
        put(self.cpu_speeds, blob, speed, _MODELS_MAX)

    def put_residency(self, residency: Residency) -> None:
        self._cached = None
        self.residencies[residency.instance, residency.blob] = residency

    def put_reservation(self, reservation: Reservation) -> None:
        self._cached = None
        self.reservations[reservation.load_id] = reservation

    def plans(self) -> list[Reservation]:
        """Reservations of loads that were not sent yet, oldest first."""
        return [reservation for reservation in self.reservations.values() if reservation.sent_at is None]

    def drop_reservation(self, load_id: LoadId) -> None:
        self._cached = None
        self.reservations.pop(load_id, None)

    def set_wanted(self, wanted: dict[BlobDigest, int]) -> None:
        """Sets the number of waiting tickets by model."""
        if wanted != self.wanted:
            self._cached = None
            self.wanted = wanted

    def set_warm_missing(self, missing: dict[str, str]) -> None:
        """Which models with `keep_warm` are not loaded, and why."""
        if missing != self.warm_missing:
            self._cached = None
            self.warm_missing = missing

    def set_ejected(self, ejected: frozenset[InstanceName]) -> None:
        """Sets on which instances nothing is loaded."""
        if ejected != self.ejected:
            self._cached = None
            self.ejected = ejected

    def set_draining(self, draining: frozenset[ResidencyKey]) -> None:
        """Sets which replicas take no new request."""
        if draining != self.draining:
            self._cached = None
            self.draining = draining

    def set_policy(self, policy: Policy) -> None:
        """The operator's settings from now on."""
        self.policy = policy
        self.version += 1

    def set_drained(self, drained: Drained) -> None:
        """What an operator has taken out of service."""
        self.drained = drained
        self.version += 1

    def set_gpu_conditions(self, *, hot: frozenset[GpuUuid], probation: frozenset[GpuUuid]) -> None:
        """Which GPUs are hot, and which are on probation."""
        self.hot_instances = frozenset(
            name for name, view in self.instances.items() if hot and not hot.isdisjoint(view.spec.gpus)
        )
        if (hot, probation) != (self.hot, self.probation):
            self.hot, self.probation = hot, probation
            self.tested_in_sets &= probation
            self.version += 1

    def set_tested_in_sets(self, gpus: frozenset[GpuUuid]) -> None:
        """Which GPUs on probation can only be tested by a load over several GPUs."""
        if gpus != self.tested_in_sets:
            self.tested_in_sets = gpus
            self.version += 1

    def set_rolling(self, rolling: RollingRestart | None) -> None:
        """Sets how far a restart that an operator requested has come."""
        if rolling != self.rolling:
            self._cached = None
            self.rolling = rolling

    def memory_changed(self, name: InstanceName, now: float) -> None:
        """A load or an unload there has ended, or its server exited: the last reading of the GPUs may not show it."""
        self._cached = None
        self.changed_at = now
        view = self.instances.get(name)
        if view is not None:
            self.changed_on.update(dict.fromkeys(view.spec.gpus, now))

    def remember_failure(self, failure: Failure) -> None:
        self._cached = None
        self.failures.append(failure)

    def start_failed(self, gpus: frozenset[GpuUuid], now: float) -> None:
        """An instance over these GPUs failed to start."""
        self._cached = None
        self.troubled_at[gpus] = now

    def mark_large(self, blob: BlobDigest) -> None:
        """The model was placed on several GPUs."""
        self._cached = None
        self.large_blobs.add(blob)

    # --- residencies ---------------------------------------------------------------------------------------

    def update(self, key: ResidencyKey, **changes: Any) -> Residency:
        """Replaces fields of a residency; returns the new value."""
        residency = replace(self.residencies[key], **changes)
        self.residencies[key] = residency
        self.version += 1
        return residency

    def forget(self, key: ResidencyKey) -> None:
        """Drops a residency, its load and its pending work. Leases stay until their requests end."""
        residency = self.residencies.pop(key, None)
        self.works.pop(key, None)
        self.health.pop(key, None)
        self.slowest_seconds.pop(key, None)
        self.silences.pop(key, None)
        self.version += 1
        if residency is not None and residency.load_id is not None:
            self.reservations.pop(residency.load_id, None)
            self.measuring.pop(residency.load_id, None)
            self.load_reports.pop(residency.load_id, None)
        if residency is not None:
            self.touched(residency.instance)

    def forget_instance(self, name: InstanceName) -> None:
        for key in [k for k in self.residencies if k[0] == name]:
            self.forget(key)

    def has_still(self, replica: Residency) -> bool:
        """Returns True if this replica still exists, and was not replaced by a later load."""
        current = self.residencies.get((replica.instance, replica.blob))
        return current is not None and current.loaded_at == replica.loaded_at

    def has_drained(self, blobs: Collection[BlobDigest]) -> bool:
        """Returns True if a draining replica of these weights is idle."""
        for key in self.draining:
            replica = self.replicas.get(key) if key[1] in blobs else None
            if (
                replica is not None
                and replica.state is ResidencyState.READY
                and not (self.uses.get(key) or replica).in_flight
            ):
                return True
        return False

    def by_load(self, load_id: LoadId) -> Residency | None:
        return next((r for r in self.residencies.values() if r.load_id == load_id), None)

    def touched(self, name: InstanceName) -> None:
        """The router changes memory on the GPUs of this instance: measurements there become invalid."""
        view = self.instances.get(name)
        if view is not None:
            self.footprints.touched(view.spec.gpus)

    def begin_measuring(self, reservation: Reservation, key: FootprintKey, *, is_certain: bool) -> None:
        """Starts to measure the footprint of a load that is sent now, unless another load runs on its GPUs.

        `is_certain`: it is known how the server splits it over the GPUs.
        """
        self.touched(reservation.instance)
        gpus = tuple(gpu for gpu, _ in reservation.per_gpu_bytes)
        others = (r for r in self.reservations.values() if r.sent_at is not None and r.load_id != reservation.load_id)
        if gpus:
            is_alone = not any(gpu in gpus for other in others for gpu, _ in other.per_gpu_bytes)
            self.measuring[reservation.load_id] = self.footprints.before(
                key, gpus, self._used(), is_certain=is_certain, is_alone=is_alone
            )

    def load_measured(self, event: LoadMeasured) -> None:
        """Keeps what a server's output said of a load until the load's end is settled."""
        residency = self.residencies.get((event.instance, event.blob))
        load_id = residency.load_id if residency is not None else None
        if load_id is not None and load_id in self.measuring:
            self.load_reports[load_id] = event.gpus

    def _used(self) -> dict[GpuUuid, int]:
        return {uuid: gpu.memory_used_bytes for uuid, gpu in self.gpus.items()}

    def settle(self) -> list[MeasuredFootprint]:
        """Drops reservations and unloaded models that the newest reading of the GPUs already includes.

        Returns the footprints that were measured with it.
        """
        measured: list[MeasuredFootprint] = []
        for load_id, reservation in list(self.reservations.items()):
            if is_settled(reservation, self.gpus_read_at):
                del self.reservations[load_id]
                self.version += 1
                measured += self._measured(reservation)
        for key, residency in list(self.residencies.items()):
            ended = residency.unloaded_at
            if ended is not None and (self.gpus_read_at > ended or not residency.per_gpu_bytes):
                self.forget(key)
            elif residency.load_id is None and residency.state is ResidencyState.READY:
                self._measure_adopted(residency)
        return measured

    def _measure_adopted(self, residency: Residency) -> None:
        """Books an adopted model by what the driver says that its server's processes hold, where it is alone there."""
        if (
            self.gpus_read_at <= residency.loaded_at
            or sum(key[0] == residency.instance for key in self.residencies) > 1
        ):
            return
        spec = self.instances[residency.instance].spec
        sizes = process_bytes([self.gpus.get(gpu) for gpu in spec.gpus], spec)
        if sizes is not None and sizes != residency.per_gpu_bytes:
            self.update((residency.instance, residency.blob), per_gpu_bytes=sizes)

    def _measured(self, reservation: Reservation) -> list[MeasuredFootprint]:
        before, residency = self.measuring.pop(reservation.load_id, None), self.by_load(reservation.load_id)
        parts = self.load_reports.pop(reservation.load_id, ())
        if before is None or residency is None:
            return []
        found = self.footprints.after(
            before, reservation, self._used(), residency.size_vram_bytes, parts, self._context_bytes(residency)
        )
        if found is None:
            return []
        self.update((residency.instance, residency.blob), per_gpu_bytes=found.per_gpu_bytes)
        return [found] if before.is_certain else []

    def _context_bytes(self, residency: Residency) -> int:
        """A CUDA context on the GPUs of that residency, as its engine estimates it."""
        spec = self.instances[residency.instance].spec
        rules, facts = self.engines[spec.engine], self.snapshot(self.gpus_read_at)
        gpus = rules.estimate_footprint(residency.model, spec, residency.context_length, facts).gpus
        return max((gpu.cuda_context_bytes for gpu in gpus), default=0)

    # --- history -------------------------------------------------------------------------------------------

    def forget_failures(self, now: float) -> None:
        """Drops failures older than `failure_memory_seconds`."""
        horizon = now - self.policy.constants.failure_memory_seconds
        if self.footprints.raised_at and self.footprints.forget_raised(horizon):
            self.version += 1
        if self.failures:
            self._cached = None
            self.failures = [f for f in self.failures if f.at > horizon]
        if self.troubled_at:
            self._cached = None
            self.troubled_at = {gpus: at for gpus, at in self.troubled_at.items() if at > horizon}

    def record_request(self, ticket: Ticket, now: float) -> None:
        """Counts a request for its model."""
        self._cached = None
        blob = ticket.model.blob
        self.models[blob] = ticket.model
        self.dismissed.discard(blob)
        before = self.demand.get(blob) or Demand(at=now)
        self.demand[blob] = demand.record_request(before, now, self.policy.constants.demand_half_life_seconds)
        if len(self.demand) > _MODELS_MAX:
            oldest = min(self.demand, key=lambda key: (self.demand[key].at, key))
            del self.demand[oldest]
            self.models.pop(oldest, None)
            self.dismissed.discard(oldest)

    def sent(self, weights_bytes: int, now: float, *, is_unasked: bool = False) -> None:
        """A load of `weights_bytes` was sent. `is_unasked`: nobody waited for it."""
        self._cached = None
        if is_unasked:
            self.unasked_bytes = demand.record_request(
                self.unasked_bytes, now, _UNASKED_WINDOW_SECONDS, float(weights_bytes)
            )
            return
        self.sent_bytes = demand.record_request(
            self.sent_bytes, now, self.policy.constants.swap_window_seconds, float(weights_bytes)
        )

    def loaded(self, weights_bytes: int, seconds: float) -> None:
        """A load of `weights_bytes` took `seconds`. Updates the mean load rate, in which large loads weigh more."""
        self._cached = None
        read_seconds = max(0.1, seconds - self.policy.constants.load_fixed_seconds / 2)
        mean_bytes, mean_seconds = self._load_means or (
            _PRIOR_BYTES,
            _PRIOR_BYTES / self.policy.constants.load_bytes_per_second,
        )
        mean_bytes += _NEW_SHARE * (weights_bytes - mean_bytes)
        mean_seconds += _NEW_SHARE * (read_seconds - mean_seconds)
        self._load_means = (mean_bytes, mean_seconds)

    @property
    def load_rate_bytes_per_second(self) -> float | None:
        """Measured mean rate; None before the first load."""
        return None if self._load_means is None else self._load_means[0] / self._load_means[1]

    # --- slots ---------------------------------------------------------------------------------------------

    def take_slot(self, ticket: Ticket, key: ResidencyKey, now: float, share: WorkShare | None = None) -> ReplicaUse:
        """Leases one slot of the replica to the ticket. `share`: None if the model has only one replica."""
        replica = self.replicas[key]
        turn = self.prefix_affinity.served(ticket, replica) if ticket.session else None
        self.leases[ticket.id] = LeaseRecord(key, replica.loaded_at, ticket.client, now, turn, share)
        if share is not None:
            work = self.works.get(key)
            if work is None:
                work = self.works[key] = PendingWork()
            pending_work.begin(work, share, now)
            self.prefix_affinity.chosen(ticket, replica, share.fingerprints)
        self.clients[ticket.client] = self.clients.get(ticket.client, 0) + 1
        self.counters.granted(ticket)
        use = self.use_of(key)
        if ticket.keep_alive_seconds is not None:
            use.keep_alive_seconds = merged_keep_alive(
                use.keep_alive_seconds, ticket.keep_alive_seconds, others_hold=use.in_flight > 0
            )
        if self.policy.pins and self.policy.keeps_warm(replica.name):
            use.keep_alive_seconds = FOR_EVER
        use.in_flight, use.used_at, use.expires_at = use.in_flight + 1, now, None
        return use

    def end_lease(self, event: Released, now: float) -> LeaseRecord | None:
        """Removes the lease and counts what its request has used; None if there is no such lease."""
        lease = self.leases.pop(event.ticket_id, None)
        if lease is None:
            return None
        self.clients[lease.client] -= 1
        if not self.clients[lease.client]:
            del self.clients[lease.client]
        self.counters.released(lease.client, event.output_tokens)
        if event.first_byte_at is not None and not event.silent_seconds and event.failure is None:
            self._answered(lease, now)
        blob = lease.key[1]
        if blob in self.demand:
            self._cached = None
            self.demand[blob] = demand.served(self.demand[blob], now - lease.granted_at)
        if lease.turn is not None:
            lease.turn.tokens += event.output_tokens
        if lease.share is not None:
            self._end_share(lease, lease.share, event, now)
        return lease

    def _answered(self, lease: LeaseRecord, now: float) -> None:
        seconds = now - lease.granted_at
        if seconds > self.slowest_seconds.get(lease.key, 0.0):
            self.slowest_seconds[lease.key] = seconds
        self.silences.pop(lease.key, None)

    def _end_share(self, lease: LeaseRecord, share: WorkShare, event: Released, now: float) -> None:
        key, first_at = lease.key, event.first_byte_at
        replica = self.replicas.get(key)
        if replica is None or replica.loaded_at != lease.loaded_at:
            return
        pending_work.end(self.works[key], share, first_at is not None, now)
        if first_at is not None and not event.runner_lost:
            pending_work.learn(self.speeds, key, share, (lease.granted_at, first_at, now), event.output_tokens)

    def release(self, event: Released, now: float) -> Residency | None:
        """Ends a lease. Returns its replica, without the newer values in `uses`; None if it no longer exists."""
        lease = self.end_lease(event, now)
        replica = self.replicas.get(lease.key) if lease is not None else None
        if lease is None or replica is None or replica.loaded_at != lease.loaded_at:
            return None
        use = self.use_of(lease.key)
        use.in_flight, use.used_at = use.in_flight - 1, now
        is_ready = replica.state is ResidencyState.READY
        if not use.in_flight and is_ready:
            use.expires_at = expiry(use.keep_alive_seconds, now)
        if not is_ready or (not use.in_flight and lease.key not in self.draining):
            self.version += 1  # otherwise only tickets that wait for this replica, or for its unload, can proceed
        return replica
