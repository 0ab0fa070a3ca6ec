"""llamayard itself: the deciding core, unchanged, over one simulated server a GPU and one over all of them.

This is what the engine, the driver, the watcher and the gateway do in the product, in virtual time: events go into
`Dispatcher.handle`, its actions are carried out on the servers, and what comes of them is posted again. It decides
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from router.domain.actions import (
    Action,
    Grant,
    Load,
    ReadGpus,
    Reject,
    Remember,
    StartInstance,
    StopInstance,
    Unload,
)
from router.domain.events import (
    Arrived,
    Cancelled,
    Event,
    GpusRead,
    InstanceChanged,
    LoadedModel,
    LoadFailed,
    LoadFinished,
    Released,
    ResidencyRead,
    Ticked,
    UnloadFinished,
)
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey
from router.domain.snapshot import Snapshot
from router.engines.ollama.footprint_estimator import estimate_bytes, version_of
from router.engines.ollama.offload_rules import forces_spread
from router.lab.simulator.baselines.units import SimInstance, instances_over, on_demand_instance, on_demand_policy
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.server import RUNNER_LOST, LoadResult, SimServer
from router.lab.simulator.timeline import Timer
from router.scheduler.dispatcher import Dispatcher

_POLL_SECONDS = 1.0
_OLD_NEWS_SECONDS = 5.0
"""Each instance is looked at each second, but what it lists is told again only so often where nothing changed: that
halves the time of a run, and the core has nothing to learn from it."""
_START_SECONDS = 0.3
_READING_SECONDS = 0.01
"""A reading of the GPUs, from its beginning to its event."""
_UNLOAD_POLL_SECONDS = 0.05
"""Half the driver's poll: what it takes on average to see that a model is gone."""
_EARLIEST_WAKE_SECONDS = 0.01
_ATTEMPTS = 3

DecisionObserver = Callable[[Event, list[Action], float], None]


@dataclass(slots=True, eq=False)
class _Held:
    """One request between its arrival and its end."""

    request: Request
    done: OnFinished
    ticket: TicketId
    server: SimServer | None = None
    attempts: int = 1


class Llamayard:
    """The product over a simulated machine."""

    def __init__(
        self,
        machine: Machine,
        config: ServerConfig,
        policy: Policy | None = None,
        seen: DecisionObserver | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        """`seen` is told of every event with its actions. `pairs`: an instance over each two GPUs as well, as somebody
        may declare them by hand."""
        self._policy = on_demand_policy(policy or Policy(), config)
        self.dispatcher = Dispatcher(self._policy, _Remembered())
        self._machine = machine
        self._seen = seen
        own = replace(config, keep_alive_seconds=float("inf"), max_loaded=100_000, spread=False)
        self._config = own
        self._units = {unit.spec.name: unit for unit in instances_over(machine, own, pairs=pairs)}
        self._held: dict[TicketId, _Held] = {}
        self._tickets: dict[Request, TicketId] = {}
        self._wake: Timer | None = None

    # --- what the simulation asks --------------------------------------------------------------------------

    def start(self) -> None:
        """As the product does, which reads its GPUs before it takes a request."""
        self._post(GpusRead(self._machine.ledger.read(), self._now))
        for unit in list(self._units.values()):
            self._start(unit)
        self._poll()

    def submit(self, request: Request, done: OnFinished) -> None:
        self._arrive(_Held(request, done, TicketId(0)))

    def cancel(self, request: Request) -> None:
        ticket = self._tickets.pop(request, None)
        held = self._held.pop(ticket, None) if ticket is not None else None
        if held is None:
            return
        if held.server is None:
            self._post(Cancelled(held.ticket))
        else:
            held.server.cancel(request)
            self._post(Released(held.ticket))

    def snapshot(self) -> Snapshot:
        return self.dispatcher.snapshot(self._machine.timeline.now)

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        return self.dispatcher.waiting

    @property
    def held(self) -> Mapping[TicketId, Request]:
        """Requests that wait or run, by their tickets."""
        return {ticket: held.request for ticket, held in self._held.items()}

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        """What a model's runner really holds on each GPU; empty where it has none."""
        for runner in self._units[key[0]].server.loaded:
            if runner.blob == key[1]:
                return runner.bytes_by_gpu
        return {}

    # --- faults --------------------------------------------------------------------------------------------

    def server_died(self, index: int) -> None:
        """An instance dies and is started again, later each time."""
        self._kill(list(self._units.values())[index % len(self._units)])

    def _kill(self, unit: SimInstance) -> None:
        if unit.state is not InstanceState.READY:
            return
        unit.lives += 1
        self._change(unit, InstanceState.BACKOFF, "died by signal 9")
        unit.server.kill()
        wait = min(60.0, 2.0 ** len([at for at in unit.deaths if self._now - at < 120.0]))
        unit.deaths.append(self._now)
        life = unit.lives
        self._machine.timeline.after(wait, lambda: self._start(unit) if unit.lives == life else None)

    def gpu_lost(self, uuid: GpuUuid) -> None:
        for unit in list(self._units.values()):
            if uuid in unit.spec.gpus and self._units.get(unit.spec.name) is unit:
                self._kill(unit)

    # --- the way in ----------------------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._machine.timeline.now

    def _post(self, event: Event) -> None:
        now = self._now
        actions = self.dispatcher.handle(event, now)
        if self._seen is not None:
            self._seen(event, actions, now)
        for action in actions:
            self._carry_out(action)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        due = self.dispatcher.next_wake()
        if due is not None and due != float("inf"):
            delay = max(_EARLIEST_WAKE_SECONDS, due - self._now)
            self._wake = self._machine.timeline.after(delay, lambda: self._post(Ticked()))

    def _arrive(self, held: _Held) -> None:
        request = held.request
        held.ticket = TicketId(request.id * 10 + held.attempts)
        held.server = None
        self._held[held.ticket] = held
        self._tickets[request] = held.ticket
        self._post(Arrived(self._ticket(held)))

    def _ticket(self, held: _Held) -> Ticket:
        """As the gateway reads a chat request that names its conversation and no option."""
        request = held.request
        return Ticket(
            id=held.ticket,
            model=request.model,
            options=(),
            context_length=0,
            keep_alive_seconds=None,
            arrived_at=self._now,
            deadline=request.arrived_at + self._policy.queue_timeout_seconds,
            client=request.user,
            session=f"{request.user}-{request.session}",
            prompt_tokens=_guessed(request),
        )

    # --- the way out ---------------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant():
                self._grant(action)
            case Reject():
                held = self._held.pop(action.ticket_id, None)
                if held is not None:
                    del self._tickets[held.request]
                    held.done(held.request, action.code)
            case Load():
                self._load(action)
            case Unload():
                self._unload(action)
            case StartInstance():
                self._begin_instance(action.spec)
            case StopInstance():
                self._end_instance(action.instance)
            case Remember():
                pass
            case ReadGpus():
                self._soon(self._read_gpus)
            case _:
                assert_never(action)

    def _begin_instance(self, spec: InstanceSpec) -> None:
        unit = on_demand_instance(self._machine, spec, self._config)
        self._units[spec.name] = unit
        self._soon(lambda: self._start(unit))

    def _end_instance(self, name: InstanceName) -> None:
        unit = self._units.pop(name)
        unit.lives += 1
        unit.server.kill()
        self._soon(lambda: self._change(unit, InstanceState.STOPPED, "no longer needed"))

    def _grant(self, grant: Grant) -> None:
        held = self._held.get(grant.ticket_id)
        if held is None:
            self._post(Released(grant.ticket_id))
            return
        held.server = self._units[grant.instance].server
        held.server.submit(held.request, lambda _, error: self._answered(held, error))

    def _answered(self, held: _Held, error: str) -> None:
        if self._held.pop(held.ticket, None) is None:
            return
        del self._tickets[held.request]
        request = held.request
        tokens = 0 if error else request.generated_tokens
        self._post(Released(held.ticket, error == RUNNER_LOST, tokens, request.first_token_at))
        if error and held.request.first_token_at is None and held.attempts < _ATTEMPTS:
            held.attempts += 1
            self._arrive(held)
        else:
            held.done(held.request, error)

    def _load(self, load: Load) -> None:
        unit = self._units[load.instance]
        if unit.state is not InstanceState.READY:
            self._soon(lambda: self._post(LoadFailed(load.load_id, 502, "cannot connect", is_lost=True)))
            return

        def ended(result: LoadResult) -> None:
            if result.error:
                is_lost = result.error == RUNNER_LOST
                self._post(LoadFailed(load.load_id, 502 if is_lost else 500, result.error, is_lost=is_lost))
            else:
                self._post(LoadFinished(load.load_id, result.size_bytes, result.size_vram_bytes))

        unit.server.load(
            load.model, load.model.layers + 1 if load.expects_gpu else -1, lambda r: self._soon(lambda: ended(r))
        )

    def _unload(self, unload: Unload) -> None:
        def gone() -> None:
            ended = UnloadFinished(unload.instance, unload.blob)
            self._machine.timeline.after(_UNLOAD_POLL_SECONDS, lambda: self._post(ended))

        self._units[unload.instance].server.unload(unload.blob, gone)

    def _soon(self, call: Callable[[], None]) -> None:
        self._machine.timeline.after(0.002, call)

    # --- watching ------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        self._machine.timeline.after(_POLL_SECONDS, self._poll)
        self._read_gpus()
        for unit in list(self._units.values()):
            rows = self._listed(unit)
            is_news = rows != unit.listed or self._now - unit.listed_at >= _OLD_NEWS_SECONDS
            if unit.state is InstanceState.READY and is_news:
                unit.listed, unit.listed_at = rows, self._now
                self._post(ResidencyRead(unit.spec.name, rows, self._now))

    def _read_gpus(self) -> None:
        read_at = self._now
        gpus = self._machine.ledger.read()
        self._machine.timeline.after(_READING_SECONDS, lambda: self._post(GpusRead(gpus, read_at)))

    def _listed(self, unit: SimInstance) -> tuple[LoadedModel, ...]:
        return tuple(
            LoadedModel(
                name=one.model.name,
                digest=one.model.digest,
                size_bytes=one.size_bytes,
                size_vram_bytes=one.size_vram_bytes,
                context_length=min(unit.spec.context_length, one.model.context_length or unit.spec.context_length),
                model=one.model,
            )
            for one in unit.server.loaded
        )

    def _start(self, unit: SimInstance) -> None:
        if self._units.get(unit.spec.name) is not unit:
            return
        if any(uuid in self._machine.ledger.lost for uuid in unit.spec.gpus):
            self._change(unit, InstanceState.BACKOFF, "its GPU is lost")
            self._machine.timeline.after(5.0, lambda: self._start(unit))
            return
        self._change(unit, InstanceState.STARTING, "")
        life = unit.lives
        self._machine.timeline.after(_START_SECONDS, lambda: self._started(unit, life))

    def _started(self, unit: SimInstance, life: int) -> None:
        if unit.lives == life and unit.state is InstanceState.STARTING:
            self._change(unit, InstanceState.READY, "")

    def _change(self, unit: SimInstance, state: InstanceState, reason: str) -> None:
        unit.state = state
        version = ".".join(map(str, unit.server.config.version)) if state is InstanceState.READY else None
        self._post(InstanceChanged(unit.spec, state, reason, version))


class _Remembered:
    """`estimate_bytes`, asked once for what depends on no GPU's free memory: a run asks it a million times."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def __call__(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        if spec.is_spread and not forces_spread(spec):
            return estimate_bytes(model, spec, context_length, snapshot)
        version = version_of(spec, snapshot)
        key = (model.blob, spec.name, len(spec.gpus), spec.num_parallel, context_length, version)
        if key not in self._sizes:
            self._sizes[key] = estimate_bytes(model, spec, context_length, snapshot)
        return self._sizes[key]


def _guessed(request: Request) -> int:
    """The gateway knows the prompt's text, not its tokens: up to a quarter too few or too many, by the request."""
    return max(1, round(request.prompt_tokens * (0.75 + request.id * 7919 % 51 / 100)))
