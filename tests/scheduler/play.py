"""A small simulated machine around a dispatcher: GPUs with real memory use, servers, loads and requests.

The test decides what happens next. Each event is sent to two dispatchers, one of which never treats the queue as
quiescent and remembers nothing of earlier searches; both must return the same actions. Each action is carried out on
the machine, which fails the test if the action is not allowed. Memory sizes are small numbers of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from router.domain.actions import (
    AbortLoad,
    Action,
    Grant,
    Load,
    Notice,
    ReadGpus,
    Reject,
    Remember,
    RestartInstance,
    StartInstance,
    StopInstance,
    Unload,
    UnloadCause,
)
from router.domain.drained import DrainTarget
from router.domain.events import (
    Arrived,
    Cancelled,
    DrainRequested,
    Event,
    GpusRead,
    InstanceChanged,
    LoadedModel,
    LoadFailed,
    LoadFinished,
    Released,
    ResidencyRead,
    RestartRequested,
    Ticked,
    UnloadFinished,
    UnloadRequested,
)
from router.domain.explanation import Explanation
from router.domain.footprint import FootprintKey
from router.domain.gpu import Gpu, GpuUuid
from router.domain.health import ReplyFailure
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.lasting_memo import LastingMemo
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.request import Layout, RunnerOptions, Ticket, TicketId
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import (
    gpu_index,
    instances_over,
    promised,
    replicas_of,
    residencies_of,
    residencies_on,
)
from router.scheduler.dispatcher import Dispatcher
from router.scheduler.placement.cost import eviction_price
from router.scheduler.queue.retry_gate import RetryGate
from router.scheduler.queue.wait_estimate import WaitEstimate
from router.scheduler.queue.wait_queue import WaitQueue
from router.scheduler.state import FleetState
from tests.scheduler.builders import BY_WEIGHT, by_weight, gpu_id, instance, model
from tests.scheduler.builders import ticket as ticket_of

GPU_BYTES = 24


class CheckedFleet(FleetState):
    """Compares each snapshot, which may be a cached one, with a new one."""

    def snapshot(self, now: float) -> Snapshot:
        found, fresh = super().snapshot(now), self.build_snapshot(now)
        assert found == fresh
        assert promised(found) == promised(fresh)
        for uuid in self.gpus:
            assert gpu_index(found, uuid) == gpu_index(fresh, uuid)
            assert residencies_on(found, uuid) == residencies_on(fresh, uuid)
        for residency in fresh.residencies.values():
            assert replicas_of(found, residency.blob) == replicas_of(fresh, residency.blob)
            assert eviction_price(found, residency) == eviction_price(fresh, residency)
        for view in fresh.instances.values():
            gpus = frozenset(view.spec.gpus)
            assert instances_over(found, gpus) == instances_over(fresh, gpus)
            assert residencies_of(found, view.spec.name) == residencies_of(fresh, view.spec.name)
        return found


def sized(name: str, size: int, **changes: Any) -> ModelFacts:
    """A model whose weights have `size` bytes."""
    return model(name, weights_bytes=size, **changes)


class NeverQuiescent(RetryGate):
    """Makes the dispatcher handle the whole queue at each event."""

    def is_quiescent(self, fleet: FleetState, queue: WaitQueue, now: float) -> bool:
        return False


@dataclass(slots=True)
class Play:
    """The machine. `gpus`: number of GPUs; with two or more there is also a spread instance."""

    gpus: int = 1
    policy: Policy = field(default_factory=lambda: Policy(vram_margin_bytes=0))
    slots: int = 2
    now: float = 1000.0
    external: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    specs: dict[InstanceName, InstanceSpec] = field(default_factory=dict[InstanceName, InstanceSpec])
    held: dict[ResidencyKey, dict[GpuUuid, int]] = field(default_factory=dict[ResidencyKey, dict[GpuUuid, int]])
    """Real memory use, from the time a load is sent until its unload has ended."""
    loads: dict[LoadId, Load] = field(default_factory=dict[LoadId, Load])
    """Running loads."""
    unloads: dict[ResidencyKey, Unload] = field(default_factory=dict[ResidencyKey, Unload])
    unload_causes: list[UnloadCause] = field(default_factory=list[UnloadCause])
    """Of all unloads, in order."""
    waiting: dict[TicketId, Ticket] = field(default_factory=dict[TicketId, Ticket])
    leases: dict[TicketId, tuple[ResidencyKey, LoadId | None]] = field(
        default_factory=dict[TicketId, tuple[ResidencyKey, LoadId | None]]
    )
    """Slots in use: their residency, and the load that it came from."""
    endings: dict[TicketId, Grant | Reject | None] = field(default_factory=dict[TicketId, Grant | Reject | None])
    """How each ticket ended; None if it was cancelled."""
    dead: set[ResidencyKey] = field(default_factory=set[ResidencyKey])
    """Runners that died; the dispatcher may not know it yet."""
    loads_sent: int = 0
    aborted: list[LoadId] = field(default_factory=list[LoadId])
    """Loads that were broken off."""
    starting: list[InstanceName] = field(default_factory=list[InstanceName])
    """Instances that were requested and are not ready yet."""
    lost: set[GpuUuid] = field(default_factory=set[GpuUuid])
    """GPUs that cannot be read."""
    celsius: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    throttled: dict[GpuUuid, tuple[str, ...]] = field(default_factory=dict[GpuUuid, tuple[str, ...]])
    ecc_errors: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    xids: dict[GpuUuid, tuple[int, ...]] = field(default_factory=dict[GpuUuid, tuple[int, ...]])
    """For the next reading."""
    stopped: list[InstanceName] = field(default_factory=list[InstanceName])
    restarting: list[InstanceName] = field(default_factory=list[InstanceName])
    """To be restarted, and still running."""
    notices: list[Notice] = field(default_factory=list[Notice])
    remembered: dict[FootprintKey, tuple[int, ...]] = field(default_factory=dict[FootprintKey, tuple[int, ...]])
    last: list[Action] = field(default_factory=list[Action])
    _twins: tuple[Dispatcher, Dispatcher] = field(init=False)
    _tickets: int = 0

    def __post_init__(self) -> None:
        self._twins = (Dispatcher(self.policy, BY_WEIGHT), Dispatcher(self.policy, BY_WEIGHT, NeverQuiescent()))
        for twin, lasting in zip(self._twins, (LastingMemo(), None), strict=True):
            twin._fleet = CheckedFleet(self.policy, BY_WEIGHT, footprints=twin._fleet.footprints, lasting=lasting)
        self.external = {gpu_id(number): 0 for number in range(self.gpus)}
        single = [instance(f"gpu{number}", number, slots=self.slots) for number in range(self.gpus)]
        several = [instance("spread", *range(self.gpus), slots=self.slots)] if self.gpus > 1 else []
        none = [] if self.gpus else [instance("cpu", slots=self.slots)]
        self.specs = {spec.name: spec for spec in (*single, *several, *none)}
        self.read_gpus()

    def begin(self) -> Play:
        """Makes all instances ready."""
        for name in self.specs:
            self.change_instance(name, InstanceState.READY)
        return self

    # --- events ------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> list[Action]:
        before = self.snapshot()
        self.last, again = (twin.handle(event, self.now) for twin in self._twins)
        assert self.last == again, "the same events must give the same actions, however much was handled or remembered"
        for action in self.last:
            self._carry_out(action, before)
        return self.last

    def bring_up(self) -> None:
        """Makes requested instances ready."""
        while self.starting:
            self.change_instance(self.starting.pop(0), InstanceState.READY)

    def advance(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.post(Ticked())

    def read_gpus(self, progress: float = 1.0) -> list[Action]:
        """Posts a reading of the GPUs. `progress`: share of their memory that running loads use already."""
        return self.post(GpusRead(tuple(self._gpu(number, progress) for number in range(self.gpus)), self.now))

    def change_instance(self, name: str, state: InstanceState, reason: str = "") -> list[Action]:
        spec, draining = self.specs[InstanceName(name)], self._twins[0]._fleet.restarts_due
        if state is InstanceState.READY and (name in draining or name in self.restarting):
            self.change_instance(name, InstanceState.BACKOFF)  # its server has ended before
        if name in self.restarting:
            self.restarting.remove(InstanceName(name))
        if state not in (InstanceState.READY, InstanceState.DRAINING):
            self._lose(InstanceName(name))
        return self.post(InstanceChanged(spec, state, reason))

    def arrive(
        self,
        of: ModelFacts,
        options: RunnerOptions = (),
        keep_alive_seconds: float | None = None,
        ttft_target_seconds: float = 300.0,
        *,
        is_flexible: bool = False,
        layout: Layout | None = None,
        client: str = "",
        default_context: int | None = None,
        avoid: str | None = None,
    ) -> TicketId:
        """`default_context`: it cannot name a context, and needs this one; 0: the usual one."""
        self._tickets += 1
        made = self._ticket(
            self._tickets, of, options, keep_alive_seconds, ttft_target_seconds, is_flexible=is_flexible,
            layout=layout, client=client, default_context=default_context, avoid=avoid,
        )  # fmt: skip
        self.waiting[made.id] = made
        self.post(Arrived(made))
        return made.id

    def explain(
        self, of: ModelFacts, options: RunnerOptions = (), *, is_flexible: bool = False, layout: Layout | None = None
    ) -> Explanation:
        """What would become of such a request now."""
        made = self._ticket(self._tickets + 1, of, options, is_flexible=is_flexible, layout=layout)
        before = self.snapshot()
        found, again = (twin.explain(made, self.now) for twin in self._twins)
        assert found == again
        assert self.snapshot() == before
        return found

    def explain_placement(self, ticket: TicketId) -> Explanation | None:
        """How its model was placed."""
        found, again = (twin.explain_placement(ticket) for twin in self._twins)
        assert (found and found[0]) == (again and again[0])
        return None if found is None else found[0]

    def _ticket(
        self,
        number: int,
        of: ModelFacts,
        options: RunnerOptions = (),
        keep_alive_seconds: float | None = None,
        ttft_target_seconds: float = 300.0,
        *,
        is_flexible: bool = False,
        layout: Layout | None = None,
        client: str = "",
        default_context: int | None = None,
        avoid: str | None = None,
    ) -> Ticket:
        made = ticket_of(
            number, of, options=options, keep_alive_seconds=keep_alive_seconds, arrived_at=self.now,
            deadline=self.now + ttft_target_seconds, is_flexible=is_flexible, layout=layout,
        )  # fmt: skip
        return replace(
            made,
            client=client,
            avoid=None if avoid is None else InstanceName(avoid),
            takes_default_context=default_context is not None,
            context_length=default_context or 0,
        )

    def cancel(self, ticket: TicketId) -> list[Action]:
        del self.waiting[ticket]
        self.endings[ticket] = None
        return self.post(Cancelled(ticket))

    def release(
        self,
        ticket: TicketId,
        *,
        runner_lost: bool = False,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> list[Action]:
        """The request ends: answered in full, or given up by its client after so much silence."""
        del self.leases[ticket]
        first_byte_at = None if runner_lost or silent_seconds or failure else self.now
        return self.post(Released(ticket, runner_lost, 0, first_byte_at, silent_seconds, failure))

    def finish_load(self, load: LoadId, on_cpu: int = 0) -> list[Action]:
        """Ends a load successfully, with `on_cpu` of its bytes on the CPU."""
        sent = self.loads.pop(load)
        size = max(1, sent.model.weights_bytes)
        return self.post(LoadFinished(load, size, size - on_cpu if sent.expects_gpu else 0))

    def fail_load(
        self, load: LoadId, status: int = 500, message: str = "it will not", *, is_lost: bool = False,
        is_memory_short: bool = False,
    ) -> list[Action]:  # fmt: skip
        sent = self.loads.pop(load)
        self.held.pop((sent.instance, sent.model.blob), None)
        return self.post(LoadFailed(load, status, message, is_lost, is_memory_short))

    def finish_unload(self, key: ResidencyKey, error: str | None = None) -> list[Action]:
        del self.unloads[key]
        if error is None:
            self.held.pop(key, None)
        return self.post(UnloadFinished(key[0], key[1], error))

    def ask_unload(self, of: ModelFacts) -> list[Action]:
        return self.post(UnloadRequested(of.blob))

    def drain(self, *, gpu: int | None = None, instance: str | None = None, resume: bool = False) -> list[Action]:
        """An operator drains a GPU, an instance, or everything, or resumes it."""
        target = DrainTarget(None if gpu is None else gpu_id(gpu), None if instance is None else InstanceName(instance))
        return self.post(DrainRequested(target, resume))

    def restart(self, *names: str, timeout_seconds: float = 300.0) -> list[Action]:
        """An operator requests a restart of these instances."""
        return self.post(RestartRequested(tuple(map(InstanceName, names)), timeout_seconds))

    def list_models(self, name: str, on_cpu: int = 0) -> list[Action]:
        """Posts the loaded models of an instance, without those that are still loading; `on_cpu` bytes of each are on
        the CPU."""
        loading = {(load.instance, load.model.blob) for load in self.loads.values()}
        known = self.snapshot().residencies
        rows = [
            LoadedModel(known[key].name, "", sum(sizes.values()), sum(sizes.values()) - on_cpu, None, known[key].model)
            for key, sizes in self.held.items()
            if key[0] == name and key not in loading and key in known
        ]
        return self.post(ResidencyRead(InstanceName(name), tuple(rows), self.now))

    def lose_runner(self, key: ResidencyKey) -> list[Action]:
        """The runner of a loaded model dies; its server no longer lists it."""
        self.now += 0.01
        if self.held.pop(key, None) is not None:
            self.dead.add(key)
        return self.list_models(key[0])

    def finish_restarts(self) -> None:
        """Servers that are to be restarted have ended, and those that are always there answer again."""
        for name in list(self.restarting):
            if self.specs[name].on_demand:
                self.change_instance(name, InstanceState.STOPPED)
            else:
                self.change_instance(name, InstanceState.READY)

    # --- steps -------------------------------------------------------------------------------------------------

    def work_through(self, rounds: int = 30) -> None:
        """Ends all loads and unloads successfully and reads the GPUs, until nothing is left to do."""
        for _ in range(rounds):
            self.now += 0.1
            self.read_gpus()
            for key in list(self.unloads):
                self.finish_unload(key)
            for load in list(self.loads):
                self.finish_load(load)
            self.finish_restarts()
            self.now += 0.1
            self.read_gpus()
            if not self.loads and not self.unloads:
                return

    # --- state --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._twins[0].snapshot(self.now)

    def fair_share_spread(self) -> float:
        return self._twins[0].fair_share_spread()

    def residency(self, on: str, of: ModelFacts) -> Residency | None:
        return self.snapshot().residencies.get((InstanceName(on), of.blob))

    def state(self, on: str, of: ModelFacts) -> ResidencyState | None:
        found = self.residency(on, of)
        return None if found is None else found.state

    def reason(self, ticket: TicketId) -> str:
        """What a waiting ticket waits for."""
        return next((reason for waiting, reason in self._twins[0].waiting if waiting.id == ticket), "")

    def wait_estimate(self, ticket: TicketId) -> WaitEstimate:
        """Position and expected wait of a ticket."""
        found, again = (twin.wait_estimates(self.now) for twin in self._twins)
        assert found == again
        return found[ticket]

    def queued(self) -> list[TicketId]:
        return [ticket.id for ticket, _ in self._twins[0].waiting]

    @property
    def next_wake(self) -> float | None:
        return self._twins[0].next_wake()

    def free_bytes(self, gpu: GpuUuid) -> int:
        """Really free bytes; running loads count with their full size."""
        return GPU_BYTES - self.external[gpu] - sum(sizes.get(gpu, 0) for sizes in self.held.values())

    def grant(self, ticket: TicketId) -> Grant:
        found = self.endings[ticket]
        assert isinstance(found, Grant), found
        return found

    def rejection(self, ticket: TicketId) -> Reject:
        found = self.endings[ticket]
        assert isinstance(found, Reject), found
        return found

    # --- actions -------------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action, before: Snapshot) -> None:
        match action:
            case Grant():
                self._granted(action)
            case Reject():
                self._ended(action.ticket_id, action)
            case Load():
                self._load(action)
            case AbortLoad():
                del self.loads[action.load_id]  # the server keeps its memory until the unload ends
                self.aborted.append(action.load_id)
            case Unload():
                self.unload_causes.append(action.cause)
                self._unload(action, before)
            case StartInstance():
                self.specs[action.spec.name] = replace(action.spec, url=f"http://127.0.0.1/{action.spec.name}")
                self.starting.append(action.spec.name)
            case StopInstance():
                assert all(key[0] != action.instance for key in self.held), "an instance is stopped that holds memory"
                self.stopped.append(action.instance)
            case RestartInstance():
                self.restarting.append(action.instance)
            case Notice():
                self.notices.append(action)
            case Remember():
                self.remembered[action.footprint.key] = action.footprint.per_gpu_bytes
            case ReadGpus():
                pass

    def _ended(self, ticket: TicketId, how: Grant | Reject) -> Ticket:
        assert ticket not in self.endings, f"ticket {ticket} ended twice"
        self.endings[ticket] = how
        return self.waiting.pop(ticket)

    def _granted(self, grant: Grant) -> None:
        ticket = self._ended(grant.ticket_id, grant)
        facts, key = self.snapshot(), (grant.instance, ticket.model.blob)
        assert facts.instances[grant.instance].state is InstanceState.READY
        assert key in self.held or key in self.dead
        found = facts.residencies[key]
        if ticket.takes_default_context:
            given = facts.instances[grant.instance].spec.context_length
            assert found.context_length == min(given, ticket.model.context_length) >= ticket.context_length
        else:
            assert found.options == ticket.options or ticket.is_flexible
        assert ticket.layout is None or ticket.layout.allows(facts.instances[grant.instance].spec.gpus)
        assert (grant.options, grant.context_length) == (found.options, found.context_length)
        self.leases[ticket.id] = (key, found.load_id)

    def _load(self, load: Load) -> None:
        key, spec = (load.instance, load.model.blob), self.specs[load.instance]
        assert key not in self.held, f"{key} is loaded or being loaded there already"
        shares = by_weight(load.model, spec, 0, self.snapshot())
        for gpu, size in zip(spec.gpus, shares, strict=True):
            room = self.free_bytes(gpu)
            assert size <= room, f"{load.model.name} is sent to {load.instance}: {size} on {gpu}, which has {room}"
        self.dead.discard(key)
        self.held[key] = dict(zip(spec.gpus, shares, strict=True))
        self.loads[load.load_id] = load
        self.loads_sent += 1

    def _unload(self, unload: Unload, before: Snapshot) -> None:
        key = (unload.instance, unload.blob)
        assert key not in self.unloads, f"{key} is being unloaded already"
        residency = before.residencies.get(key)
        is_repeated = residency is not None and residency.state is ResidencyState.UNLOADING
        is_failed = is_repeated or unload.cause in (UnloadCause.RUNNER_LOST, UnloadCause.SPILLED)
        busy = sum(1 for lease in self.leases.values() if residency and lease == (key, residency.load_id))
        assert is_failed or not busy, f"{key} was unloaded with {busy} requests: {unload.reason}"
        self.unloads[key] = unload

    def _lose(self, name: InstanceName) -> None:
        """Removes an instance's memory use, loads and unloads, because its processes are gone."""
        self.held = {key: sizes for key, sizes in self.held.items() if key[0] != name}
        self.loads = {load_id: load for load_id, load in self.loads.items() if load.instance != name}
        self.unloads = {key: unload for key, unload in self.unloads.items() if key[0] != name}

    def _gpu(self, number: int, progress: float) -> Gpu:
        gpu = gpu_id(number)
        loading = {(load.instance, load.model.blob) for load in self.loads.values()}
        ours = sum(int(sizes.get(gpu, 0) * (progress if key in loading else 1.0)) for key, sizes in self.held.items())
        used = self.external[gpu] + ours
        error = "GPU is lost" if gpu in self.lost else None
        return Gpu(
            gpu, number, "gpu", GPU_BYTES, GPU_BYTES - used, used, error=error,
            temperature_celsius=self.celsius.get(gpu), throttle_reasons=self.throttled.get(gpu, ()),
            ecc_errors_uncorrected=self.ecc_errors.get(gpu, 0), xids=self.xids.pop(gpu, ()),
        )  # fmt: skip


def with_policy(policy: Policy, **changes: object) -> Policy:
    """The policy with some values replaced."""
    return replace(policy, **changes)  # type: ignore[arg-type]
