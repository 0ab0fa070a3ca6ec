"""`check-config` beyond single keys: whether models with rules are installed and fit on this machine's GPUs.

Makes the same decision as at run time, with all GPUs assumed to be empty: what is refused here is refused there too.
Reads GPUs and the model directory, blocking; starts nothing, asks no server and changes no file. Reports what it could
not check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from router.app.fleet_checks import check_fleet, models_with_rules
from router.app.hardware import EmulatedMachine, instance_plan, temporary_emulator
from router.app.other_engines import attached_servers
from router.app.warm_models import WarmModel, warm_together
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec, InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.model_names import ANY_MODEL, is_cloud, parse_name
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.gguf_facts import read_facts
from router.engines.ollama.instance_plan import PlanError
from router.engines.ollama.rules import OllamaRules
from router.gpu.nvml import NoGpus, open_nvml
from router.gpu.poller import GpuReader
from router.scheduler.placement.placement import NoFit, PlacementRequest, place

_ENGINE = OllamaRules()


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """Sentences: what cannot be satisfied, what could not be checked, and what is probably not meant."""

    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Machine:
    """GPUs and models of the machine."""

    gpus: tuple[Gpu, ...] | None
    """As if nothing ran on them; None if they cannot be read."""
    models_directory: str
    facts: Callable[[str], ModelFacts | None]
    """Facts of a model by its name; None if it is not installed or its weights cannot be read."""
    is_installed: Callable[[str], bool]
    version: str | None = None
    """Of the servers, if known."""
    unreadable_reason: str = ""
    """Why the GPUs cannot be read."""


def check_machine(
    settings: Settings, environment: Mapping[str, str], open_gpus: Callable[[], GpuReader | NoGpus] = open_nvml
) -> PreflightResult:
    """Checks everything that the configuration says about GPUs and about models on them."""
    try:
        attached_servers(settings)  # reads the files of their keys
        if settings.rig is not None:
            with temporary_emulator(settings, settings.rig, environment) as rig:
                return _check(settings, _emulated(rig))
        reader = open_gpus() if _mentions_gpus(settings) else NoGpus("no key is about GPUs")
        return _check(settings, _real(settings, reader))
    except PlanError as error:
        return PreflightResult((str(error),))
    except ConfigError as error:
        return PreflightResult(tuple(error.problems))


def _mentions_gpus(settings: Settings) -> bool:
    return bool(
        models_with_rules(settings)
        or settings.placement.exclusive_gpus
        or settings.ollama.instance_env
        or "vram_margin_bytes" in settings.placement.model_fields_set
        or any(instance.gpus for instance in settings.instances)
    )


def _real(settings: Settings, reader: GpuReader | NoGpus) -> _Machine:
    store = BlobStore(settings.ollama.models)

    def facts(name: str) -> ModelFacts | None:
        return read_facts(store, name)

    def is_installed(name: str) -> bool:
        return store.get(parse_name(name)) is not None

    if isinstance(reader, NoGpus):
        return _Machine(None, str(store.folder), facts, is_installed, unreadable_reason=reader.reason)
    gpus = reader.read()
    reader.close()
    return _Machine(tuple(map(emptied, gpus)), str(store.folder), facts, is_installed)


def _emulated(rig: EmulatedMachine) -> _Machine:
    return _Machine(rig.gpus, str(rig.models_directory), rig.facts, rig.is_installed, rig.version)


def emptied(gpu: Gpu) -> Gpu:
    """The GPU as if nothing was loaded on it."""
    free = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
    return replace(gpu, memory_free_bytes=free, memory_used_bytes=0)


def _check(settings: Settings, machine: _Machine) -> PreflightResult:
    about_models = (*_absent_targets(settings, machine), *_contexts_above_trained(settings, machine))
    plan = instance_plan(settings, machine.models_directory)
    if machine.gpus is None:
        skipped = (f"whether pins to GPUs hold: {machine.unreadable_reason}",) if _mentions_gpus(settings) else ()
        return PreflightResult(unchecked=skipped, warnings=about_models)
    fleet = check_fleet(settings, machine.gpus, plan)
    warnings = (*fleet.warnings, *about_models)
    if fleet.problems or fleet.policy is None:
        return PreflightResult(fleet.problems, warnings=warnings)
    snapshot = empty_snapshot(fleet.policy, machine.gpus, fleet.specs, machine.version)
    unreadable = [f"GPU {gpu.index} cannot be read: {gpu.error}" for gpu in machine.gpus if gpu.error is not None]
    found = _with_models(snapshot, machine, models_with_rules(settings), unreadable)
    return replace(found, warnings=(*warnings, *found.warnings))


def empty_snapshot(policy: Policy, gpus: Sequence[Gpu], specs: Sequence[InstanceSpec], version: str | None) -> Snapshot:
    """The machine with its instances ready and nothing loaded."""
    return Snapshot(
        now=0.0,
        policy=policy,
        gpus={gpu.uuid: gpu for gpu in gpus},
        gpus_read_at=0.0,
        instances={spec.name: InstanceView(spec, InstanceState.READY, version) for spec in specs},
        residencies={},
        reservations={},
        engines={_ENGINE.kind: _ENGINE},
    )


def _absent_targets(settings: Settings, machine: _Machine) -> Iterator[str]:
    """Aliases and fallbacks that lead to models that are not installed."""
    if any(instance.url is not None for instance in settings.instances):
        return  # attached servers may have stores of their own
    targets = [(f"aliases.{name}", target) for name, target in settings.aliases.items()]
    targets += [(f"fallbacks.{name}.to", each) for name, fallback in settings.fallbacks.items() for each in fallback.to]
    for key, target in targets:
        is_cloud_model = settings.ollama.cloud and is_cloud(target)
        if not is_cloud_model and not machine.is_installed(settings.aliases.get(target, target)):
            yield f"{key}: {target} is not among the models in {machine.models_directory}"


def _contexts_above_trained(settings: Settings, machine: _Machine) -> Iterator[str]:
    for name, rules in settings.models.items():
        facts = machine.facts(name) if name != ANY_MODEL and rules.context_length is not None else None
        if facts is not None and rules.context_length is not None and 0 < facts.context_length < rules.context_length:
            yield (
                f"models.{name}.context_length: {rules.context_length} tokens are more than the "
                f"{facts.context_length} that the model was trained for: it gets {facts.context_length}"
            )


def _with_models(snapshot: Snapshot, machine: _Machine, names: Sequence[str], unreadable: list[str]) -> PreflightResult:
    problems: list[str] = []
    unchecked = [*unreadable]
    warm: list[WarmModel] = []
    for name in names:
        pin = snapshot.policy.pins[parse_name(name).shortest]
        if pin.cpu or any(snapshot.gpus[gpu].error is not None for gpu in pin.gpus):
            continue
        facts = machine.facts(name)
        if facts is None:
            unchecked.append(f"whether models.{name} fits: it is not among the models in {machine.models_directory}")
            continue
        options = _ENGINE.default_options(facts, pin, snapshot.policy.context_length)
        found = place(snapshot, _ENGINE.estimate_bytes, PlacementRequest(facts, options))
        if isinstance(found, NoFit):
            problems.append(f"models.{name}: {found.message}")
        elif pin.keep_warm:
            warm.append(WarmModel(name, facts, options, is_pinned=bool(pin.gpus)))
    together = warm_together(snapshot, _ENGINE, warm)
    return PreflightResult((*problems, *together.problems), (*unchecked, *together.unchecked), together.warnings)
