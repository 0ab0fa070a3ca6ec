"""`check-config` beyond single keys: whether pinned models fit on this machine's GPUs.

Makes the same decision as at run time, with all GPUs assumed to be empty: what is refused here is refused there too.
Reads GPUs and the model directory, blocking; starts nothing, asks no server and changes no file. Reports what it could
not check.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from router.app.hardware import EmulatedMachine, instance_plan, temporary_emulator
from router.config.policy import ANY_MODEL, policy_of
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.model_names import parse_name
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import capacity_bytes
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.gguf_facts import read_facts
from router.engines.ollama.instance_plan import PlanError, on_demand_like, plan_instances
from router.engines.ollama.rules import OllamaRules
from router.gpu.nvml import NoGpus, open_nvml
from router.gpu.poller import GpuReader
from router.scheduler.placement.explain import explain_shortfall
from router.scheduler.placement.placement import NoFit, Placed, PlacementRequest, place

_ENGINE = OllamaRules()
_PORTS = 20_000
"""First port of the planned instances; none is opened."""


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """Sentences: what cannot be satisfied, and what could not be checked."""

    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Machine:
    """GPUs and models of the machine."""

    gpus: tuple[Gpu, ...] | None
    """As if nothing ran on them; None if they cannot be read."""
    models_directory: str
    facts: Callable[[str], ModelFacts | None]
    """Facts of a model by its name; None if it is not installed or its weights cannot be read."""
    version: str | None = None
    """Of the servers, if known."""
    unreadable_reason: str = ""
    """Why the GPUs cannot be read."""


def check_pins(
    settings: Settings, environment: Mapping[str, str], open_gpus: Callable[[], GpuReader | NoGpus] = open_nvml
) -> PreflightResult:
    """Checks everything that the configuration says about GPUs and about models on them."""
    try:
        if settings.rig is not None:
            with temporary_emulator(settings, settings.rig, environment) as rig:
                return _check(settings, _emulated(rig))
        if not _mentions_gpus(settings):
            return PreflightResult()
        return _check(settings, _real(settings, open_gpus()))
    except PlanError as error:
        return PreflightResult((str(error),))
    except ConfigError as error:
        return PreflightResult(tuple(error.problems))


def _mentions_gpus(settings: Settings) -> bool:
    return bool(
        _placed(settings) or settings.placement.exclusive_gpus or any(instance.gpus for instance in settings.instances)
    )


def _placed(settings: Settings) -> list[str]:
    """Names of models whose rules pin them to GPUs or keep them loaded."""
    return [
        name
        for name, rules in settings.models.items()
        if name != ANY_MODEL and (rules.gpus or rules.layout != "auto" or rules.keep_warm)
    ]


def _real(settings: Settings, reader: GpuReader | NoGpus) -> _Machine:
    store = BlobStore(settings.ollama.models)

    def facts(name: str) -> ModelFacts | None:
        return read_facts(store, name)

    if isinstance(reader, NoGpus):
        return _Machine(None, str(store.folder), facts, unreadable_reason=reader.reason)
    gpus = reader.read()
    reader.close()
    return _Machine(tuple(map(_emptied, gpus)), str(store.folder), facts)


def _emulated(rig: EmulatedMachine) -> _Machine:
    return _Machine(rig.gpus, str(rig.models_directory), rig.facts, rig.version)


def _emptied(gpu: Gpu) -> Gpu:
    free = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
    return replace(gpu, memory_free_bytes=free, memory_used_bytes=0)


def _check(settings: Settings, machine: _Machine) -> PreflightResult:
    plan = instance_plan(settings, machine.models_directory)
    if machine.gpus is None:
        return PreflightResult(unchecked=(f"whether pins to GPUs hold: {machine.unreadable_reason}",))
    specs = plan_instances(machine.gpus, plan, itertools.count(_PORTS))
    policy = policy_of(settings, machine.gpus, on_demand_like(plan))
    snapshot = Snapshot(
        now=0.0,
        policy=policy,
        gpus={gpu.uuid: gpu for gpu in machine.gpus},
        gpus_read_at=0.0,
        instances={spec.name: InstanceView(spec, InstanceState.READY, machine.version) for spec in specs},
        residencies={},
        reservations={},
        engines={_ENGINE.kind: _ENGINE},
    )
    unreadable = [f"GPU {gpu.index} cannot be read: {gpu.error}" for gpu in machine.gpus if gpu.error is not None]
    return _with_models(snapshot, machine, _placed(settings), unreadable)


def _with_models(snapshot: Snapshot, machine: _Machine, names: Sequence[str], unreadable: list[str]) -> PreflightResult:
    problems: list[str] = []
    unchecked = [*unreadable]
    warm: list[_WarmModel] = []
    for name in names:
        pin = snapshot.policy.pins[parse_name(name).shortest]
        if pin.cpu or any(snapshot.gpus[gpu].error is not None for gpu in pin.gpus):
            continue
        facts = machine.facts(name)
        if facts is None:
            unchecked.append(f"whether models.{name} fits: it is not among the models in {machine.models_directory}")
            continue
        found = place(
            snapshot,
            _ENGINE.estimate_bytes,
            PlacementRequest(facts, _ENGINE.default_options(facts, pin, snapshot.policy.context_length)),
        )
        if isinstance(found, NoFit):
            problems.append(f"models.{name}: {found.message}")
        elif isinstance(found, Placed) and pin.keep_warm and pin.gpus:
            warm.append(_WarmModel(name, facts.blob, _minimum_bytes(snapshot, facts, found)))
    return PreflightResult((*problems, *_overcommitted(snapshot, warm)), tuple(unchecked))


@dataclass(frozen=True, slots=True)
class _WarmModel:
    """A model that is never unloaded."""

    name: str
    blob: BlobDigest
    minimum_bytes: Mapping[GpuUuid, int]
    """VRAM on each of its GPUs with a single slot."""


def _minimum_bytes(snapshot: Snapshot, facts: ModelFacts, placed: Placed) -> Mapping[GpuUuid, int]:
    spec = replace(placed.start or snapshot.instances[placed.instance].spec, num_parallel=1)
    sizes = _ENGINE.estimate_bytes(facts, spec, _ENGINE.context_length(placed.options, facts, spec), snapshot)
    return dict(zip(spec.gpus, sizes, strict=True))


def _overcommitted(snapshot: Snapshot, warm: Sequence[_WarmModel]) -> Iterator[str]:
    """A sentence for each GPU that cannot hold all models that are kept warm on it."""
    by_weights = {model.blob: model for model in warm}.values()
    for gpu in sorted({gpu for model in by_weights for gpu in model.minimum_bytes}):
        models = [model for model in by_weights if gpu in model.minimum_bytes]
        size = sum(model.minimum_bytes[gpu] for model in models)
        if len(models) > 1 and size > capacity_bytes(snapshot, gpu):
            names = " and ".join(f"models.{model.name}" for model in models)
            yield f"{names} cannot be kept warm together: {explain_shortfall(snapshot, [(gpu, size)])}"
