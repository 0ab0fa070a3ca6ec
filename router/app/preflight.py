"""What `check-config` sees beyond the keys: whether the pins hold on the GPUs, and with the models, that are here.

The same decision as at run time is made over GPUs that are taken to be empty: what is refused here is refused there.
It looks at GPUs and into the folder of models, blocking; it starts nothing, asks no server and changes no file. What
it cannot see it names, and does not guess.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router.app.hardware import instance_plan
from router.config.policy import ANY_MODEL, policy_of
from router.config.settings import ConfigError, Settings
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import BlobDigest, ModelFacts
from router.domain.model_names import parse_name
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import capacity_bytes
from router.engines.ollama.footprint_estimator import estimate_bytes
from router.engines.ollama.instance_plan import PlanError, on_demand_like, plan_instances
from router.engines.ollama.runner_options import default_runner_options
from router.gpu.nvml import NoGpus, open_nvml
from router.gpu.poller import GpuReader
from router.lab.emulator.model_facts import facts_of
from router.lab.emulator.prepare import VERSION_VARIABLE, prepare_emulator
from router.lab.emulator.spec import SpecError
from router.lab.emulator.store import Store
from router.scheduler.placement.explain import explain_shortfall
from router.scheduler.placement.placement import NoFit, Placed, PlacementRequest, context_of, place

_PORTS = 20_000
"""Where ports are counted from; none is opened."""


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """Sentences: what cannot hold, and what could not be looked at."""

    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Here:
    """What there is. `gpus`: as if nothing ran on them; None where they cannot be seen, and `why`."""

    gpus: tuple[Gpu, ...] | None
    stores: tuple[Store, ...]
    version: str | None = None
    why: str = ""


def check_pins(
    settings: Settings, environment: Mapping[str, str], open_gpus: Callable[[], GpuReader | NoGpus] = open_nvml
) -> PreflightResult:
    """Whether all that the configuration says of GPUs and of models on them can hold here."""
    try:
        if settings.rig is not None:
            return _on_rig(settings, settings.rig, environment)
        if not _mentions_gpus(settings):
            return PreflightResult()
        return _check(settings, _real(settings, open_gpus()))
    except (SpecError, PlanError) as error:
        return PreflightResult((str(error),))
    except ConfigError as error:
        return PreflightResult(tuple(error.problems))


def _mentions_gpus(settings: Settings) -> bool:
    return bool(_placed(settings) or settings.placement.exclusive_gpus or any(one.gpus for one in settings.instances))


def _placed(settings: Settings) -> list[str]:
    """Names of models whose entry says where they go, or that they are there at all times."""
    return [
        name
        for name, one in settings.models.items()
        if name != ANY_MODEL and (one.gpus or one.layout != "auto" or one.keep_warm)
    ]


def _real(settings: Settings, reader: GpuReader | NoGpus) -> _Here:
    stores = (Store(settings.ollama.models, is_written=False),)
    if isinstance(reader, NoGpus):
        return _Here(None, stores, why=reader.reason)
    gpus = reader.read()
    reader.close()
    return _Here(tuple(map(_emptied, gpus)), stores)


def _on_rig(settings: Settings, text: str, environment: Mapping[str, str]) -> PreflightResult:
    """The rig is made in a folder that goes again; models that were put into the real one's count too."""
    own = settings.state_directory / "rig" / "models"
    with tempfile.TemporaryDirectory() as folder:
        rig = prepare_emulator(text, Path(folder), environment)
        stores = (Store(own, is_written=False), Store(rig.models_directory, is_written=False))
        return _check(settings, _Here(rig.reader.read(), stores, rig.environment[VERSION_VARIABLE]))


def _emptied(gpu: Gpu) -> Gpu:
    free = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
    return replace(gpu, memory_free_bytes=free, memory_used_bytes=0)


def _check(settings: Settings, here: _Here) -> PreflightResult:
    plan = instance_plan(settings, str(here.stores[0].folder))
    if here.gpus is None:
        return PreflightResult(unchecked=(f"whether pins to GPUs hold: {here.why}",))
    specs = plan_instances(here.gpus, plan, itertools.count(_PORTS))
    policy = policy_of(settings, here.gpus, on_demand_like(plan))
    snapshot = Snapshot(
        now=0.0,
        policy=policy,
        gpus={gpu.uuid: gpu for gpu in here.gpus},
        gpus_read_at=0.0,
        instances={spec.name: InstanceView(spec, InstanceState.READY, here.version) for spec in specs},
        residencies={},
        reservations={},
    )
    broken = [f"GPU {gpu.index} cannot be read: {gpu.error}" for gpu in here.gpus if gpu.error is not None]
    return _with_models(snapshot, here.stores, _placed(settings), broken)


def _with_models(
    snapshot: Snapshot, stores: Sequence[Store], names: Sequence[str], broken: list[str]
) -> PreflightResult:
    problems: list[str] = []
    unchecked = [*broken]
    warm: list[_Warm] = []
    for name in names:
        pin = snapshot.policy.pins[parse_name(name).shortest]
        if pin.cpu or any(snapshot.gpus[gpu].error is not None for gpu in pin.gpus):
            continue
        facts = _facts(stores, name)
        if facts is None:
            unchecked.append(f"whether models.{name} fits: it is not among the models in {stores[0].folder}")
            continue
        found = place(
            snapshot,
            estimate_bytes,
            PlacementRequest(facts, default_runner_options(facts, pin, snapshot.policy.context_length)),
        )
        if isinstance(found, NoFit):
            problems.append(f"models.{name}: {found.message}")
        elif isinstance(found, Placed) and pin.keep_warm and pin.gpus:
            warm.append(_Warm(name, facts.blob, _least(snapshot, facts, found)))
    return PreflightResult((*problems, *_crowded(snapshot, warm)), tuple(unchecked))


def _facts(stores: Sequence[Store], name: str) -> ModelFacts | None:
    """Of the model in the first store that has it; None where none has, or its weights cannot be read."""
    for store in stores:
        stored = store.get(parse_name(name))
        if stored is not None and (header := store.header(stored.weights.digest)).tensors:
            return facts_of(stored, header)
    return None


@dataclass(frozen=True, slots=True)
class _Warm:
    """A model that is never unloaded, and what it takes of each of its GPUs with a single slot."""

    name: str
    blob: BlobDigest
    least_bytes: Mapping[GpuUuid, int]


def _least(snapshot: Snapshot, facts: ModelFacts, placed: Placed) -> Mapping[GpuUuid, int]:
    spec = replace(placed.start or snapshot.instances[placed.instance].spec, num_parallel=1)
    sizes = estimate_bytes(facts, spec, context_of(placed.options, facts, spec), snapshot)
    return dict(zip(spec.gpus, sizes, strict=True))


def _crowded(snapshot: Snapshot, warm: Sequence[_Warm]) -> Iterator[str]:
    """Models that shall all be kept warm on GPUs that cannot hold them together."""
    by_weights = {one.blob: one for one in warm}.values()
    for gpu in sorted({gpu for one in by_weights for gpu in one.least_bytes}):
        there = [one for one in by_weights if gpu in one.least_bytes]
        size = sum(one.least_bytes[gpu] for one in there)
        if len(there) > 1 and size > capacity_bytes(snapshot, gpu):
            together = " and ".join(f"models.{one.name}" for one in there)
            yield f"{together} cannot be kept warm together: {explain_shortfall(snapshot, [(gpu, size)])}"
