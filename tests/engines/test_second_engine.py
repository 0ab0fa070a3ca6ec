"""A second engine next to Ollama: its models are placed, loaded, served and evicted on its own instances only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from router.control.controller import Controller, rejection
from router.control.effects import Effects
from router.control.poller import PollIntervals, StatePoller
from router.domain.actions import Grant, Load, Reject, Unload
from router.domain.events import (
    Event,
    GpusRead,
    InstanceChanged,
    LoadedModel,
    LoadFailed,
    LoadFinished,
    ResidencyRead,
    UnloadFinished,
)
from router.domain.footprint import Footprint, FootprintKey, GpuFootprint
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Pin, Policy
from router.domain.request import RunnerOptions, Ticket, TicketId
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Estimate, Snapshot
from router.engines.base import Engine, Loader, ModelSource
from router.engines.ollama.rules import KIND
from router.errors import RouterError
from router.scheduler.dispatcher import Dispatcher
from router.supervisor.orphan_reaper import run_id
from router.supervisor.supervisor import Supervisor, SupervisorConfig
from tests.control.stage import turns
from tests.scheduler.builders import MIB, ByWeight, gpu, gpu_id, instance, model
from tests.supervisor.conftest import ManualClock, Marked
from tests.support.waiting import eventually

ECHO = "echo"
TAKES = 6_000 * MIB
SLOTS = 3
GPU_MIB = 10_000


class SilentReport:
    """Report of a server that does not log its GPUs."""

    problem: str | None = None
    is_final = False
    has_devices = False
    unexpected: tuple[str, ...] = ()

    def read_line(self, line: str) -> bool:
        del line
        return False


class V1Only:
    """Servers that have only the OpenAI API."""

    def known(self, view: InstanceView, path: str) -> bool | None:
        return view.spec.engine == ECHO and path.startswith("/v1/")

    async def has(self, view: InstanceView, path: str) -> bool:
        return self.known(view, path) is True


class EchoLoads:
    """Its output says nothing of loads."""

    def read_line(self, line: str) -> None:
        return None


@dataclass
class EchoEngine:
    """Fixed bytes on each GPU, a fixed number of slots, no options; loads and unloads end at once."""

    kind: str = ECHO
    title: str = "Echo"
    program: tuple[str, ...] = ("sleep", "60")
    loads: list[Load] = field(default_factory=list[Load])
    unloads: list[Unload] = field(default_factory=list[Unload])
    probes: list[str] = field(default_factory=list[str])
    holding: dict[InstanceName, list[ModelFacts]] = field(default_factory=dict[InstanceName, list[ModelFacts]])

    # --- memory

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return (TAKES,) * len(spec.gpus)

    def estimate_footprint(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> Footprint:
        return Footprint.of((GpuFootprint(weights_bytes=TAKES),) * len(spec.gpus))

    def estimate_facts(self, spec: InstanceSpec, snapshot: Snapshot) -> object:
        return None

    def margin_ratio(self, model: ModelFacts) -> float:
        return 0.0

    def worst_case_bytes(
        self, estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return estimate(model, spec, context_length, snapshot)

    def is_split_certain(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> bool:
        return True

    def footprint_key(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> FootprintKey:
        return FootprintKey(model.blob, len(spec.gpus), context_length, SLOTS, "")

    def sets_own_layers(self, model: ModelFacts) -> bool:
        return False

    def runs_elsewhere(self, model: ModelFacts) -> bool:
        return False

    def explain_override(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> str:
        return ""

    # --- time, slots and options

    def reload_seconds(self, model: ModelFacts, fixed_seconds: float, bytes_per_second: float) -> float:
        return 120.0

    def slots(self, model: ModelFacts, spec: InstanceSpec) -> int:
        return SLOTS

    def runner_options(
        self, model: ModelFacts, requested: Mapping[str, object], default_context_length: int
    ) -> RunnerOptions:
        return ()

    def default_options(self, model: ModelFacts, pin: Pin | None, default_context_length: int) -> RunnerOptions:
        return ()

    def default_context_length(self, model: ModelFacts, default_context_length: int) -> int:
        return model.context_length

    def options_with_context(
        self, model: ModelFacts, context_length: int, default_context_length: int
    ) -> RunnerOptions:
        return ()

    def requested_context(self, options: RunnerOptions) -> int | None:
        return None

    def context_length(self, options: RunnerOptions, model: ModelFacts, spec: InstanceSpec) -> int:
        return model.context_length

    def load_options(self, model: ModelFacts, options: RunnerOptions, default_context_length: int) -> RunnerOptions:
        return options

    def gives_by_default(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        return replica.options == ticket.options

    def can_adapt(self, replica: Residency, ticket: Ticket, spec: InstanceSpec) -> bool:
        return True

    # --- instances

    def tuned_for(self, like: InstanceSpec, gpus: Sequence[Gpu]) -> InstanceSpec:
        return like

    def on_demand_instance(self, spec: InstanceSpec, port: int) -> InstanceSpec:
        return replace(spec, url=f"http://127.0.0.1:{port}")

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:
        return self.program

    async def probe(self, url: str, timeout_seconds: float) -> str:
        self.probes.append(url)
        return "echo-1"

    def load_reader(self, spec: InstanceSpec) -> EchoLoads:
        return EchoLoads()

    def gpu_report(self, spec: InstanceSpec) -> SilentReport:
        return SilentReport()

    # --- loads and models

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        self.loads.append(load)
        self.holding.setdefault(load.instance, []).append(load.model)
        return LoadFinished(load.load_id, TAKES, TAKES)

    async def unload(self, unload: Unload) -> UnloadFinished:
        self.unloads.append(unload)
        self.holding[unload.instance].remove(unload.model)
        return UnloadFinished(unload.instance, unload.blob)

    async def loaded(self, spec: InstanceSpec) -> tuple[LoadedModel, ...]:
        held = self.holding.get(spec.name, [])
        return tuple(LoadedModel(each.name, each.digest, TAKES, TAKES, None, each) for each in held)

    async def refresh(self) -> None: ...

    async def facts(self, name: str) -> ModelFacts | None:
        return echo_model(name) if name.startswith("echo") else None

    async def tidy(self) -> bool:
        return True

    @property
    def endpoint_support(self) -> V1Only:
        return V1Only()


class OllamaAtOnce(ByWeight):
    """Ollama's rules, with loads and unloads that end at once."""

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self.unloads: list[Unload] = []

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        self.loads.append(load)
        return LoadFinished(load.load_id, 1, 1)

    async def unload(self, unload: Unload) -> UnloadFinished:
        self.unloads.append(unload)
        return UnloadFinished(unload.instance, unload.blob)


def echo_model(name: str) -> ModelFacts:
    return replace(model(name), blob=BlobDigest(f"echo:{name}"), engine=ECHO)


def echo_instance(name: str, *gpus: int) -> InstanceSpec:
    return replace(instance(name, *gpus), engine=ECHO)


SPECS = (instance("gpu0", 0), instance("gpu1", 1), echo_instance("echo0", 0), echo_instance("echo1", 1))


@dataclass
class Machine:
    """Two GPUs, each with an instance of either engine, under a real controller and dispatcher."""

    controller: Controller
    ollama: OllamaAtOnce
    echo: EchoEngine
    clock: ManualClock

    def read_gpus(self) -> None:
        """Posts the GPUs as the driver would report them with the models loaded now."""
        residencies = self.controller.snapshot().residencies.values()
        used = dict.fromkeys((gpu_id(0), gpu_id(1)), 0)
        for residency in residencies:
            is_there = residency.state in (ResidencyState.READY, ResidencyState.UNLOADING)
            if is_there and residency.unloaded_at is None:
                for uuid, size in zip(self._gpus_of(residency.instance), residency.per_gpu_bytes, strict=True):
                    used[uuid] += size
        gpus = tuple(gpu(n, GPU_MIB - used[gpu_id(n)] // MIB, total_mib=GPU_MIB) for n in (0, 1))
        self.controller.post(GpusRead(gpus, self.controller.now()))

    def _gpus_of(self, name: InstanceName) -> tuple[GpuUuid, ...]:
        return self.controller.snapshot().instances[name].spec.gpus

    async def settle(self, decided: asyncio.Future[Grant | Reject]) -> None:
        """Lets loads and unloads end, and time pass, until the request is decided and the GPUs show it."""
        for _ in range(100):
            await turns()
            self.clock.advance(1.0)
            self.read_gpus()
            if decided.done():
                break

    async def served(self, of: ModelFacts) -> Grant:
        """A request that is granted; it keeps its slot."""
        decided: asyncio.Future[Grant | Reject] = asyncio.get_running_loop().create_future()
        now = self.controller.now()
        ticket = Ticket(self.controller.new_ticket_id(), of, (), 0, None, now, now + 60.0, is_flexible=True)
        self.controller.submit(ticket, decided.set_result)
        await self.settle(decided)
        decision = decided.result()
        if isinstance(decision, Reject):
            raise rejection(decision)
        return decision

    async def used(self, of: ModelFacts) -> str:
        """A request that ends at once; the instance that served it."""
        grant = await self.served(of)
        self.controller.release(TicketId(grant.ticket_id))
        return grant.instance

    def loaded(self) -> set[tuple[str, str]]:
        return {(key[0], residency.name) for key, residency in self.controller.snapshot().residencies.items()}


@asynccontextmanager
async def machine(specs: Sequence[InstanceSpec] = SPECS) -> AsyncGenerator[Machine]:
    ollama, echo = OllamaAtOnce(), EchoEngine()
    dispatcher = Dispatcher(Policy(vram_margin_bytes=0), {KIND: ollama, ECHO: echo})
    loaders: dict[str, Loader] = {KIND: ollama, ECHO: echo}
    nothing = lambda *_: None  # noqa: E731
    effects = Effects(loaders, nothing, nothing, nothing, nothing, nothing)
    clock = ManualClock()
    async with Controller(dispatcher, effects, clock.now) as controller:
        found = Machine(controller, ollama, echo, clock)
        found.read_gpus()
        for spec in specs:
            version = "echo-1" if spec.engine == ECHO else "0.24.0"
            controller.post(InstanceChanged(spec, InstanceState.READY, version=version))
        yield found


def test_the_second_engine_satisfies_the_protocol() -> None:
    engine: Engine = EchoEngine()
    assert engine.kind == ECHO


async def test_each_model_is_loaded_by_its_engine_on_an_instance_of_it() -> None:
    async with machine() as on:
        assert await on.used(model("llama", 1_000)) in ("gpu0", "gpu1")
        assert await on.used(echo_model("echo-a")) in ("echo0", "echo1")
        assert [load.model.name for load in on.ollama.loads] == ["llama"]
        assert [load.model.name for load in on.echo.loads] == ["echo-a"]


async def test_the_second_engines_slots_and_bytes_are_its_own() -> None:
    async with machine() as on:
        held = [await on.served(echo_model("echo-a")) for _ in range(SLOTS)]
        assert {(grant.slots, grant.context_length) for grant in held} == {(SLOTS, 8192)}
        assert len(on.echo.loads) == 1
        (residency,) = on.controller.snapshot().residencies.values()
        assert residency.per_gpu_bytes == (TAKES,)


async def test_both_engines_evict_each_others_models_from_a_gpu_and_unload_them_by_the_right_one() -> None:
    async with machine([spec for spec in SPECS if spec.gpus == (gpu_id(0),)]) as on:
        llama, echo = model("llama", 8_000), echo_model("echo-a")
        assert await on.used(llama) == "gpu0"
        assert await on.used(echo) == "echo0"
        assert [unload.model.name for unload in on.ollama.unloads] == ["llama"]
        assert on.echo.unloads == []
        assert await on.used(llama) == "gpu0"
        assert [unload.model.name for unload in on.echo.unloads] == ["echo-a"]
        assert on.loaded() == {("gpu0", "llama")}


async def test_a_model_whose_engine_has_no_instance_is_refused_by_that_engines_name() -> None:
    async with machine([spec for spec in SPECS if spec.engine == KIND]) as on:
        with pytest.raises(RouterError, match="no Echo instance is running"):
            await on.used(echo_model("echo-a"))
        assert await on.used(model("llama")) in ("gpu0", "gpu1")


async def test_many_models_of_both_engines_never_meet_on_an_instance() -> None:
    async with machine() as on:
        models = [each for n in range(4) for each in (model(f"llama{n}", 3_000), echo_model(f"echo{n}"))]
        for of in (*models, *reversed(models), *models[::3]):
            name = await on.used(of)
            assert name.startswith("echo" if of.engine == ECHO else "gpu")
        assert {load.model.engine for load in on.echo.loads} == {ECHO}
        assert {load.model.engine for load in on.ollama.loads} == {KIND}
        for name, of in on.loaded():
            assert name.startswith("echo") == of.startswith("echo")


async def test_the_poller_asks_each_instances_engine_what_is_loaded() -> None:
    echo, posted = EchoEngine(), list[Event]()
    echo.holding = {InstanceName("echo0"): [echo_model("echo-a")]}
    async with machine() as on:
        engines: dict[str, ModelSource] = {ECHO: echo}
        specs = [view for view in on.controller.snapshot().instances.values() if view.spec.engine == ECHO]
        facts = replace(on.controller.snapshot(), instances={view.spec.name: view for view in specs})
        poller = StatePoller(
            NoGpus(), engines, lambda: facts, posted.append, on.controller.now, PollIntervals(60.0, 0.001, 60.0)
        )
        polling = asyncio.ensure_future(poller.run())
        await eventually(lambda: posted)
        polling.cancel()
        on.controller.post(next(e for e in posted if isinstance(e, ResidencyRead) and e.models))
        assert ("echo0", "echo-a") in on.loaded()
        assert await on.used(echo_model("echo-a")) == "echo0"
        assert on.echo.loads == []


class NoGpus:
    async def read(self) -> tuple[Gpu, ...]:
        return ()


async def test_the_supervisor_starts_and_probes_a_server_as_its_engine_says(
    tmp_path: Path,
) -> None:
    echo, changes, marked = EchoEngine(), list[InstanceChanged](), Marked()
    config = SupervisorConfig(state_directory=str(tmp_path), run_id=run_id(), environment=marked.environment)
    supervisor = Supervisor(config, {ECHO: echo}, changes.append, ManualClock())
    supervisor.add(echo_instance("echo0", 0))
    async with asyncio.timeout(60.0), asyncio.TaskGroup() as tasks:
        tasks.create_task(supervisor.run())
        await supervisor.wait_for(InstanceName("echo0"), InstanceState.READY)
        assert supervisor.pid(InstanceName("echo0")) is not None
        await supervisor.stop_all()
    assert [(change.state, change.version) for change in changes][:2] == [
        (InstanceState.STARTING, None),
        (InstanceState.READY, "echo-1"),
    ]
    assert not marked.alive()
    assert echo.probes == ["http://127.0.0.1/echo0"]
