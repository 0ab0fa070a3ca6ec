"""The composition root: builds all components from the settings and connects them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import aiohttp
from aiohttp import hdrs

from router.admission.key_ring import KeyStore
from router.api.app import ApiHandlers
from router.api.context import ApiContext
from router.api.management_rules import ManagementRules
from router.api.operator_actions import OperatorActions
from router.app.adoption import PlannedInstance
from router.app.entrances import Entrances
from router.app.hardware import Hardware, instance_plan
from router.app.lifecycle import Router
from router.app.other_engines import OtherEngines, attached_servers
from router.app.records import Records
from router.app.reload import Apply, ReadSettings, Reloader, check_reload
from router.app.run_time_pins import RunTimePins, marked, still_needed, with_pins
from router.app.service_manager import ServiceManager
from router.app.supervised_models import supervised_models
from router.config.policy import policy_of, warm_models
from router.config.settings import ConfigError, Settings
from router.control.controller import Controller
from router.control.effects import Effects
from router.control.poller import PollIntervals, StatePoller
from router.domain.events import FootprintsLoaded, GpusRead, InstanceChanged, LoadMeasured, PolicyChanged
from router.domain.gpu import Gpu
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model_names import rule_key
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.domain.snapshot_index import is_loading, overflow_instances
from router.engines.base import Engine
from router.engines.ollama.engine import OllamaEngine
from router.engines.ollama.instance_plan import (
    InstancePlan,
    PlanError,
    on_demand_like,
    plan_instances,
    port_of,
    ports_needed,
)
from router.gpu.host_memory import host_free_bytes
from router.gpu.poller import GpuPoller
from router.gpu.process_owners import OwnedProcessReader
from router.http1.via import Via
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits
from router.llm_api.model_aliases import substitutes
from router.observability.request_history import RequestHistory
from router.scheduler.dispatcher import Dispatcher
from router.storage.footprint_store import FootprintStore
from router.supervisor import orphan_reaper
from router.supervisor.instance import SupervisorConfig
from router.supervisor.kept_process import KeepRules
from router.supervisor.ports import NoFreePort, free_ports
from router.supervisor.process import ChildProcess
from router.supervisor.supervisor import Supervisor

_KEPT_GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL for servers that no router has adopted."""


@contextlib.asynccontextmanager
async def build(
    settings: Settings, hardware: Hardware, reading: GpusRead, tls: ssl.SSLContext | None,
    read_settings: ReadSettings, environment: Mapping[str, str], instances: Sequence[PlannedInstance],
) -> AsyncGenerator[Router]:  # fmt: skip
    """Builds and connects all components; leaving the context releases what they hold. `reading`: the GPUs just now.
    `read_settings` reads the configuration again, as at the start; `environment`: of this process.

    Raises:
        ConfigError: a pin does not fit the hardware.
    """
    records, via, store_lock = Records(settings), Via(), asyncio.Lock()
    async with _client_session(via) as session:
        poller, gpus = GpuPoller(OwnedProcessReader(hardware.reader)), reading.gpus
        plan = instance_plan(settings, hardware.models_directory)
        policy = policy_of(settings, gpus, on_demand_like(plan))
        history, keys, lag = RequestHistory(), KeyStore(), records.metrics.loop_lag.observe

        def snapshot() -> Snapshot:
            return dispatcher.snapshot(time.monotonic())

        footprints = FootprintStore(settings.state_directory / "footprints.json")
        config, loads = _supervisor_config(settings, hardware), partial(_is_loading, snapshot)
        others = _others(settings, hardware, config, reading.gpus, policy, snapshot, via)
        ollama = OllamaEngine(hardware.command, plan, session, snapshot, time.monotonic, store_lock, others.has)
        engines: dict[str, Engine] = {ollama.kind: ollama, **others.engines}
        dispatcher = Dispatcher(policy, engines)

        def on_instance_change(event: InstanceChanged) -> None:
            controller.post(event)
            if event.state is InstanceState.READY:
                state_poller.poll_models()

        def on_load(event: LoadMeasured) -> None:
            controller.post(event)

        def poll_gpus() -> None:
            state_poller.poll_gpus()

        supervisor = Supervisor(config, engines, on_instance_change, on_load=on_load, is_loading=loads)
        effects = _effects(engines, supervisor, poll_gpus, footprints)
        async with (
            Controller(dispatcher, effects, time.monotonic, (*records.observers, history)) as controller,
            records.recording(controller) as access_log,
        ):
            context = _context(settings, hardware, controller, ollama, others, session, store_lock)
            state_poller = _state_poller(settings, hardware, poller, engines, controller, records, policy)
            apply = _application(controller, context, state_poller, gpus, plan)
            reloader = Reloader(settings, read_settings, lambda changed: check_reload(changed, environment), apply)
            actions = OperatorActions(reloader.answer, reloader.pin, supervisor.output)
            handlers = ApiHandlers(context, records.metrics, history, actions, keys, hardware.title, records.last_hour)
            try:
                controller.post(FootprintsLoaded(footprints.read()))
                controller.post(reading)
                for each in instances:
                    supervisor.add(each.spec, each.claim)
                for spec in others.instances:
                    supervisor.add(spec)
                entrances = Entrances(settings, context, others, handlers, access_log, via, lag, keys)
                api_server, library, proxy = entrances.endpoint()
                records.watch(proxy.running_requests)
                watcher = entrances.key_watcher(proxy.forget_heads)
                yield Router(
                    controller, supervisor, state_poller, api_server, proxy, library, tls, context.cutoff,
                    hardware.title, settings.server.drain_timeout_seconds, watcher, entrances.admin(proxy.context),
                    reloader, ServiceManager(environment, os.getpid()), settings.ollama.adopt, _adopted(instances),
                )  # fmt: skip
            finally:
                for part in (handlers, others, ollama, poller):
                    await part.close()


def _adopted(instances: Sequence[PlannedInstance]) -> tuple[InstanceName, ...]:
    return tuple(each.spec.name for each in instances if each.claim is not None)


def _is_loading(snapshot: Callable[[], Snapshot], name: InstanceName) -> bool:
    return is_loading(snapshot(), name)


def _application(
    controller: Controller, context: ApiContext, state_poller: StatePoller, gpus: tuple[Gpu, ...], plan: InstancePlan
) -> Apply:
    """Applies reloaded settings and run-time pins to what runs; raises ConfigError before anything has changed."""

    def apply(settings: Settings, pins: RunTimePins) -> RunTimePins:
        pins = still_needed(pins, policy_of(settings, gpus, on_demand_like(plan)))
        policy = marked(policy_of(with_pins(settings, pins), gpus, on_demand_like(plan)), pins)
        rules = _rules(settings, context.removing)
        controller.post(PolicyChanged(policy))
        context.rules.become(rules)
        context.limits.become(_limits(settings))
        state_poller.set_warm(warm_models(policy))
        return pins

    return apply


def planned_instances(settings: Settings, hardware: Hardware, gpus: tuple[Gpu, ...]) -> tuple[InstanceSpec, ...]:
    """The instances that this router runs, with free ports.

    Raises:
        ConfigError: an instance does not fit the hardware.
    """
    plan = instance_plan(settings, hardware.models_directory)
    try:
        return plan_instances(gpus, plan, free_ports(ports_needed(gpus, plan)))
    except (PlanError, NoFreePort) as error:
        raise ConfigError([str(error)]) from error


def _others(
    settings: Settings, hardware: Hardware, config: SupervisorConfig, gpus: tuple[Gpu, ...], policy: Policy,
    snapshot: Callable[[], Snapshot], via: Via,
) -> OtherEngines:  # fmt: skip
    """The engines beside Ollama."""
    taken: list[int] = []

    def port() -> int:
        taken.extend(free_ports(1, os.getpid() + 1, avoid=taken))
        return taken[-1]

    def spawn(
        command: Sequence[str], environment: Mapping[str, str], name: InstanceName, on_line: Callable[[str], None]
    ) -> ChildProcess:
        marks = orphan_reaper.process_marks(config.state_directory, config.run_id, name)
        return ChildProcess.spawn(command, {**config.environment, **environment, **marks}, on_line)

    models = supervised_models(settings, Path(hardware.models_directory), gpus, policy, port)
    return OtherEngines(attached_servers(settings), models, spawn, snapshot, {hdrs.VIA: via.value})


def _effects(
    engines: Mapping[str, Engine],
    supervisor: Supervisor,
    poll_gpus: Callable[[], None],
    footprints: FootprintStore,
) -> Effects:
    def start(spec: InstanceSpec) -> None:
        ports_in_use = [port_of(view.spec) for view in supervisor.views]
        try:
            (port,) = free_ports(1, avoid=ports_in_use)
        except OSError as error:  # no free port, or no file descriptor to look for one
            supervisor.refuse(spec, f"no free port: {error}")
            return
        supervisor.add(engines[spec.engine].on_demand_instance(spec, port))

    return Effects(engines, start, supervisor.retire, supervisor.restart, poll_gpus, footprints.remember)


def _client_session(via: Via) -> aiohttp.ClientSession:
    """Passes bytes on unchanged: no decompression, no connection limit, no cookies of its own, no timeout.

    Adds `via` to each request.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0),
        headers={hdrs.VIA: via.value},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


def _state_poller(
    settings: Settings, hardware: Hardware, poller: GpuPoller, engines: Mapping[str, Engine], controller: Controller,
    records: Records, policy: Policy,
) -> StatePoller:  # fmt: skip
    poll = settings.poll
    intervals = PollIntervals(poll.gpu_seconds, poll.residency_seconds, poll.catalog_seconds)
    post = records.sampling(controller)
    host_memory = partial(_host_free_bytes, settings, hardware, controller.snapshot)
    warm = warm_models(policy)
    return StatePoller(poller, engines, controller.snapshot, post, controller.now, intervals, warm, host_memory)


def _context(
    settings: Settings,
    hardware: Hardware,
    controller: Controller,
    ollama: OllamaEngine,
    others: OtherEngines,
    session: aiohttp.ClientSession,
    store_lock: asyncio.Lock,
) -> ApiContext:
    removing = set[str]()
    return ApiContext(
        controller=controller,
        catalog=ollama.catalog,
        session=session,
        limits=_limits(settings),
        rules=_rules(settings, removing),
        endpoint_support=ollama.endpoint_support,
        writing=store_lock,
        removing=removing,
        management=_management(settings, Path(hardware.models_directory)),
        attached=others.models,
    )


def _host_free_bytes(settings: Settings, hardware: Hardware, snapshot: Callable[[], Snapshot]) -> int | None:
    """Host memory that a copy of a model could take; None while nothing may use it. On a rig, that of the rig."""
    if settings.placement.cpu == "never":
        return None
    if hardware.host_memory_bytes is None:
        return host_free_bytes()
    facts = snapshot()
    copies = (r for r in facts.residencies.values() if r.instance in overflow_instances(facts))
    return hardware.host_memory_bytes - sum(r.size_bytes for r in copies)


def _limits(settings: Settings) -> RequestLimits:
    return RequestLimits(
        max_body_bytes=settings.server.max_body_bytes,
        max_connections=settings.server.max_connections,
        queue_timeout_seconds=settings.queue.timeout_seconds,
        first_byte_timeout_seconds=settings.stream.first_byte_timeout_seconds,
        idle_timeout_seconds=settings.stream.idle_timeout_seconds,
        head_timeout_seconds=settings.server.head_timeout_seconds,
        body_timeout_seconds=settings.server.body_timeout_seconds,
        body_total_timeout_seconds=settings.server.body_total_timeout_seconds,
        body_bytes_per_second_min=settings.server.body_bytes_per_second_min,
        connection_timeout_seconds=settings.server.connection_timeout_seconds,
    )


def _management(settings: Settings, store: Path) -> ManagementRules:
    def free_bytes() -> int | None:
        try:
            return shutil.disk_usage(store).free
        except OSError:
            return None

    management = settings.management
    return ManagementRules(
        management.pull,
        management.pull_max_bytes,
        management.disk_free_min_bytes,
        management.push,
        free_bytes,
    )


def _rules(settings: Settings, removing: set[str]) -> ModelRules:
    rules = {rule_key(name): entry for name, entry in settings.models.items()}
    fallbacks = {name: (entry.to, entry.reasons) for name, entry in settings.fallbacks.items()}
    return ModelRules(
        default_context_length=settings.ollama.context_length,
        substitutes=substitutes(settings.aliases, fallbacks, listed=settings.server.list_aliases),
        passes={name: entry.options == "pass" for name, entry in rules.items()},
        context_lengths={name: entry.context_length for name, entry in rules.items() if entry.context_length},
        context_length_max=settings.ollama.context_length_max,
        cloud=settings.ollama.cloud,
        heartbeat_seconds=settings.stream.heartbeat_seconds,
        removing=removing,
    )


def _supervisor_config(settings: Settings, hardware: Hardware) -> SupervisorConfig:
    return SupervisorConfig(
        state_directory=str(settings.state_directory),
        run_id=orphan_reaper.run_id(),
        environment=hardware.environment,
        start_timeout_seconds=settings.ollama.start_timeout_seconds,
        keep=_keep_rules(settings),
    )


def _keep_rules(settings: Settings) -> KeepRules | None:
    if not settings.ollama.adopt:
        return None
    return KeepRules(str(settings.state_directory), settings.ollama.adopt_timeout_seconds, _KEPT_GRACE_SECONDS)
