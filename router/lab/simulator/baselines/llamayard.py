"""The simulated router: the real scheduler over simulated servers, one per GPU and one over all GPUs.

It does in virtual time what the controller, the Ollama driver, the pollers and the proxy do in the product: it passes
events to `Dispatcher.handle`, executes the resulting actions on the servers and posts their results as new events. All
decisions are the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

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
)
from router.domain.gpu import GpuUuid
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey
from router.domain.snapshot import Snapshot
from router.engines.ollama.driver import is_memory_short
from router.engines.ollama.footprint_estimator import version_of
from router.engines.ollama.offload_rules import forces_spread
from router.engines.ollama.rules import KIND, OllamaRules
from router.lab.simulator.baselines.units import (
    SimInstance,
    instances_over,
    on_demand_instance,
    on_demand_policy,
    overflow_instance,
)
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.server import RUNNER_LOST, LoadJob, LoadResult, SimServer
from router.lab.simulator.timeline import Timer
from router.scheduler.dispatcher import Dispatcher

_POLL_SECONDS = 1.0
_REPOST_SECONDS = 5.0
"""Instances are polled every second, but an unchanged model list is posted only this often. This halves a run's time;
the scheduler learns nothing from a repeated list."""
_START_SECONDS = 0.3
_READING_SECONDS = 0.01
"""Delay between a GPU reading and its event."""
_UNLOAD_POLL_SECONDS = 0.05
"""Half the driver's poll interval: the mean delay until it notices that a model is unloaded."""
_EARLIEST_WAKE_SECONDS = 0.01
_ATTEMPTS = 3
_PROBE_PROMPT_TOKENS, _PROBE_TOKENS = 300, 16
"""Of the answer that measures a model's speed; `engines/ollama/client.py`."""
_DRAIN_TIMEOUT_SECONDS = 10.0

DecisionObserver = Callable[[Event, list[Action], float], None]


@dataclass(slots=True, eq=False)
class _OpenRequest:
    """A request from its arrival to its end."""

    request: Request
    done: OnFinished
    ticket: TicketId
    server: SimServer | None = None
    attempts: int = 1


class Llamayard:
    """The router over a simulated machine."""

    def __init__(
        self,
        machine: Machine,
        config: ServerConfig,
        policy: Policy | None = None,
        observer: DecisionObserver | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        """`observer` is called with every event and its actions. `pairs`: also one instance per pair of GPUs, as a user
        could configure them."""
        self._policy = on_demand_policy(policy or Policy(), config)
        self.dispatcher = Dispatcher(self._policy, {KIND: _CachedRules()})
        self._machine = machine
        self._observer = observer
        instance_config = replace(config, keep_alive_seconds=float("inf"), max_loaded=100_000, spread=False)
        self._config = instance_config
        self._instances = {
            instance.spec.name: instance for instance in instances_over(machine, instance_config, pairs=pairs)
        }
        if self._policy.cpu is not None:
            overflow = overflow_instance(machine, instance_config)
            self._instances[overflow.spec.name] = overflow
        self._open_requests: dict[TicketId, _OpenRequest] = {}
        self._tickets: dict[Request, TicketId] = {}
        self._load_jobs: dict[LoadId, LoadJob] = {}
        self._wake: Timer | None = None

    # --- Baseline interface --------------------------------------------------------------------------------

    def start(self) -> None:
        """Reads the GPUs before the first request, as the product does."""
        self._post(GpusRead(self._machine.ledger.read(), self._now, self.host_free_bytes()))
        for instance in list(self._instances.values()):
            self._start(instance)
        self._poll()

    def submit(self, request: Request, done: OnFinished) -> None:
        self._arrive(_OpenRequest(request, done, TicketId(0)))

    def cancel(self, request: Request) -> None:
        ticket = self._tickets.pop(request, None)
        open_request = self._open_requests.pop(ticket, None) if ticket is not None else None
        if open_request is None:
            return
        if open_request.server is None:
            self._post(Cancelled(open_request.ticket))
        else:
            open_request.server.cancel(request)
            self._post(Released(open_request.ticket))

    def snapshot(self) -> Snapshot:
        return self.dispatcher.snapshot(self._machine.timeline.now)

    @property
    def waiting(self) -> tuple[tuple[Ticket, str], ...]:
        return self.dispatcher.waiting

    @property
    def open_requests(self) -> Mapping[TicketId, Request]:
        """Waiting and running requests by ticket."""
        return {ticket: open_request.request for ticket, open_request in self._open_requests.items()}

    def bytes_held(self, key: ResidencyKey) -> Mapping[GpuUuid, int]:
        """Bytes that the model's runner really holds on each GPU; empty if there is none."""
        instance = self._instances.get(key[0])
        for runner in instance.server.loaded if instance is not None else ():
            if runner.blob == key[1]:
                return runner.bytes_by_gpu
        return {}

    # --- faults --------------------------------------------------------------------------------------------

    def server_died(self, index: int) -> None:
        """Crashes an instance; it restarts with exponential backoff."""
        self._crash(list(self._instances.values())[index % len(self._instances)])

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Unloads of an instance fail from now on, or succeed again."""
        names = sorted(self._instances)
        self._instances[names[index % len(names)]].fails_unloads = is_failing

    def _crash(self, instance: SimInstance) -> None:
        if instance.state is not InstanceState.READY:
            return
        instance.generation += 1
        self._set_state(instance, InstanceState.BACKOFF, "died by signal 9")
        instance.server.kill()
        wait = min(60.0, 2.0 ** len([at for at in instance.crash_times if self._now - at < 120.0]))
        instance.crash_times.append(self._now)
        generation = instance.generation
        self._machine.timeline.after(wait, lambda: self._start(instance) if instance.generation == generation else None)

    def gpu_lost(self, uuid: GpuUuid) -> None:
        for instance in list(self._instances.values()):
            if uuid in instance.spec.gpus and self._instances.get(instance.spec.name) is instance:
                self._crash(instance)

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """An operator drains a GPU, or resumes it."""
        self._post(DrainRequested(DrainTarget(gpu=uuid), is_resumed))

    def restart_all(self) -> None:
        """An operator requests a restart of all instances, one after the other."""
        self._post(RestartRequested(tuple(self._instances), _DRAIN_TIMEOUT_SECONDS))

    # --- events --------------------------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._machine.timeline.now

    def _post(self, event: Event) -> None:
        now = self._now
        actions = self.dispatcher.handle(event, now)
        if self._observer is not None:
            self._observer(event, actions, now)
        for action in actions:
            self._execute(action)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        due = self.dispatcher.next_wake()
        if due is not None and due != float("inf"):
            delay = max(_EARLIEST_WAKE_SECONDS, due - self._now)
            self._wake = self._machine.timeline.after(delay, lambda: self._post(Ticked()))

    def _arrive(self, open_request: _OpenRequest) -> None:
        request = open_request.request
        open_request.ticket = TicketId(request.id * 10 + open_request.attempts)
        open_request.server = None
        self._open_requests[open_request.ticket] = open_request
        self._tickets[request] = open_request.ticket
        self._post(Arrived(self._ticket(open_request)))

    def _ticket(self, open_request: _OpenRequest) -> Ticket:
        """The ticket of a chat request with a session id and without options."""
        request = open_request.request
        return Ticket(
            id=open_request.ticket,
            model=request.model,
            options=(),
            context_length=0,
            keep_alive_seconds=None,
            arrived_at=self._now,
            deadline=request.arrived_at + self._policy.queue_timeout_seconds,
            client=request.user,
            session=f"{request.user}-{request.session}",
            prompt_tokens=_estimated_prompt_tokens(request),
        )

    # --- actions -------------------------------------------------------------------------------------------

    def _execute(self, action: Action) -> None:
        match action:
            case Grant():
                self._grant(action)
            case Reject():
                open_request = self._open_requests.pop(action.ticket_id, None)
                if open_request is not None:
                    del self._tickets[open_request.request]
                    open_request.done(open_request.request, action.code)
            case Load() | AbortLoad():
                self._load_or_abort(action)
            case Unload():
                self._unload(action)
            case StartInstance():
                self._begin_instance(action.spec)
            case StopInstance():
                self._end_instance(action.instance)
            case RestartInstance():
                self._restart_instance(action.instance)
            case Notice() | Remember():
                pass
            case ReadGpus():
                self._call_soon(self._read_gpus)
            case _:
                assert_never(action)

    def _begin_instance(self, spec: InstanceSpec) -> None:
        instance = on_demand_instance(self._machine, spec, self._config)
        self._instances[spec.name] = instance
        self._call_soon(lambda: self._start(instance))

    def _end_instance(self, name: InstanceName) -> None:
        instance = self._instances.pop(name)
        instance.generation += 1
        instance.server.kill()
        self._call_soon(lambda: self._set_state(instance, InstanceState.STOPPED, "no longer needed"))

    def _restart_instance(self, name: InstanceName) -> None:
        instance = self._instances[name]
        if instance.spec.on_demand:
            self._end_instance(name)
        else:
            self._call_soon(lambda: self._crash(instance))

    def _grant(self, grant: Grant) -> None:
        open_request = self._open_requests.get(grant.ticket_id)
        if open_request is None:
            self._post(Released(grant.ticket_id))
            return
        open_request.server = self._instances[grant.instance].server
        open_request.server.submit(open_request.request, lambda _, error: self._answered(open_request, error))

    def _answered(self, open_request: _OpenRequest, error: str) -> None:
        if self._open_requests.pop(open_request.ticket, None) is None:
            return
        del self._tickets[open_request.request]
        request = open_request.request
        tokens = 0 if error else request.generated_tokens
        self._post(Released(open_request.ticket, error == RUNNER_LOST, tokens, request.first_token_at))
        if error and open_request.request.first_token_at is None and open_request.attempts < _ATTEMPTS:
            open_request.attempts += 1
            self._arrive(open_request)
        else:
            open_request.done(open_request.request, error)

    def _load_or_abort(self, action: Load | AbortLoad) -> None:
        if isinstance(action, Load):
            self._load(action)
            return
        job = self._load_jobs.pop(action.load_id, None)
        if job is not None:
            self._instances[action.instance].server.abort_load(job)

    def _load(self, load: Load) -> None:
        instance = self._instances[load.instance]
        if instance.state is not InstanceState.READY:
            self._call_soon(lambda: self._post(LoadFailed(load.load_id, 502, "cannot connect", is_lost=True)))
            return

        def finished(result: LoadResult) -> None:
            if self._load_jobs.pop(load.load_id, None) is None:
                return  # it was broken off: nobody reads the answer
            if result.error:
                is_lost = result.error == RUNNER_LOST
                self._post(
                    LoadFailed(
                        load.load_id, 502 if is_lost else 500, result.error, is_lost, is_memory_short(result.error)
                    )
                )
            else:
                self._loaded(load, instance, result)

        self._load_jobs[load.load_id] = instance.server.load(
            load.model,
            load.model.layers + 1 if load.expects_gpu else -1,
            lambda r: self._call_soon(lambda: finished(r)),
        )

    def _loaded(self, load: Load, instance: SimInstance, result: LoadResult) -> None:
        """Posts the end of a load, after a short answer where that is asked for."""
        finished = LoadFinished(load.load_id, result.size_bytes, result.size_vram_bytes)
        runner = next((r for r in instance.server.loaded if r.blob == load.model.blob), None)
        if not load.measures_speed or runner is None:
            self._post(finished)
            return
        speed = MeasuredSpeed(runner.speed.prefill_seconds_per_token, runner.speed.step_seconds)
        seconds = _PROBE_PROMPT_TOKENS * speed.prompt_seconds + _PROBE_TOKENS * speed.step_seconds
        self._machine.timeline.after(seconds, lambda: self._post(replace(finished, speed=speed)))

    def _unload(self, unload: Unload) -> None:
        instance = self._instances.get(unload.instance)
        if instance is None:
            return  # it is being stopped, which ends its models
        if instance.fails_unloads:
            failed = UnloadFinished(unload.instance, unload.blob, "500: the server does not unload it")
            self._machine.timeline.after(_UNLOAD_POLL_SECONDS, lambda: self._post(failed))
            return

        def gone() -> None:
            finished = UnloadFinished(unload.instance, unload.blob)
            self._machine.timeline.after(_UNLOAD_POLL_SECONDS, lambda: self._post(finished))

        instance.server.unload(unload.blob, gone)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self._machine.timeline.after(0.002, call)

    # --- polling and instance states -----------------------------------------------------------------------

    def _poll(self) -> None:
        self._machine.timeline.after(_POLL_SECONDS, self._poll)
        self._read_gpus()
        for instance in list(self._instances.values()):
            loaded_models = self._loaded_models(instance)
            has_changed = loaded_models != instance.last_list or self._now - instance.last_list_at >= _REPOST_SECONDS
            if instance.state is InstanceState.READY and has_changed:
                instance.last_list, instance.last_list_at = loaded_models, self._now
                self._post(ResidencyRead(instance.spec.name, loaded_models, self._now))

    def _read_gpus(self) -> None:
        read_at = self._now
        gpus, free_bytes = self._machine.ledger.read(), self.host_free_bytes()
        self._machine.timeline.after(_READING_SECONDS, lambda: self._post(GpusRead(gpus, read_at, free_bytes)))

    def host_free_bytes(self) -> int:
        """What no runner holds; the page cache gives way."""
        runners = (runner for instance in self._instances.values() for runner in instance.server.loaded)
        return self._config.host_memory_bytes - sum(runner.host_bytes for runner in runners)

    def _loaded_models(self, instance: SimInstance) -> tuple[LoadedModel, ...]:
        return tuple(
            LoadedModel(
                name=runner.model.name,
                digest=runner.model.digest,
                size_bytes=runner.size_bytes,
                size_vram_bytes=runner.size_vram_bytes,
                context_length=min(
                    instance.spec.context_length, runner.model.context_length or instance.spec.context_length
                ),
                model=runner.model,
            )
            for runner in instance.server.loaded
        )

    def _start(self, instance: SimInstance) -> None:
        if self._instances.get(instance.spec.name) is not instance:
            return
        if any(uuid in self._machine.ledger.lost for uuid in instance.spec.gpus):
            self._set_state(instance, InstanceState.BACKOFF, "its GPU is lost")
            self._machine.timeline.after(5.0, lambda: self._start(instance))
            return
        self._set_state(instance, InstanceState.STARTING, "")
        generation = instance.generation
        self._machine.timeline.after(_START_SECONDS, lambda: self._started(instance, generation))

    def _started(self, instance: SimInstance, generation: int) -> None:
        if instance.generation == generation and instance.state is InstanceState.STARTING:
            self._set_state(instance, InstanceState.READY, "")

    def _set_state(self, instance: SimInstance, state: InstanceState, reason: str) -> None:
        instance.state = state
        version = ".".join(map(str, instance.server.config.version)) if state is InstanceState.READY else None
        self._post(InstanceChanged(instance.spec, state, reason, version))


class _CachedRules(OllamaRules):
    """Memoises estimates that do not depend on free memory: a run needs a million of them."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[object, ...], tuple[int, ...]] = {}

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        if spec.is_spread and not forces_spread(spec):
            return super().estimate_bytes(model, spec, context_length, snapshot)
        version = version_of(spec, snapshot)
        key = (model.blob, spec.gpus, spec.num_parallel, spec.kv_cache_type, context_length, version)
        if key not in self._sizes:
            self._sizes[key] = super().estimate_bytes(model, spec, context_length, snapshot)
        return self._sizes[key]


def _estimated_prompt_tokens(request: Request) -> int:
    """Prompt tokens as the router estimates them from the text: off by up to a quarter, fixed per request."""
    return max(1, round(request.prompt_tokens * (0.75 + request.id * 7919 % 51 / 100)))
