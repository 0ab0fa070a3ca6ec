"""Whether all models that are kept warm fit at the same time. Pure.

Searches for a set of GPUs for each model, with one slot each, the least that the router loads it with. What fits in
no arrangement cannot be held at run time either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from router.domain.gpu import GpuUuid
from router.domain.model import ModelFacts
from router.domain.request import RunnerOptions
from router.domain.snapshot import Snapshot
from router.domain.vram_ledger import capacity_bytes
from router.engines.base import SchedulingRules
from router.scheduler.placement.candidates import Bounds, candidates_of_size, sizes
from router.scheduler.placement.explain import bytes_text, explain_shortfall, gpu_label

_STEPS_MAX = 50_000
"""Limit on the search, far above what a machine of 8 GPUs with a dozen warm models needs."""

Need = Mapping[GpuUuid, int]
"""Bytes on each GPU."""


@dataclass(frozen=True, slots=True)
class WarmModel:
    """A model that is never unloaded."""

    name: str
    """As in the configuration."""
    facts: ModelFacts
    options: RunnerOptions
    is_pinned: bool
    """Whether its GPUs are given."""


@dataclass(frozen=True, slots=True)
class WarmCheck:
    """What was found, in sentences."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def warm_together(snapshot: Snapshot, engine: SchedulingRules, models: Sequence[WarmModel]) -> WarmCheck:
    """A problem for pinned models that exceed a GPU; a warning if no arrangement holds the pinned and the others."""
    distinct = list({model.facts.blob: model for model in models}.values())
    needs = {model.name: list(_needs(snapshot, engine, model)) for model in distinct}
    pinned = [model for model in distinct if model.is_pinned and needs[model.name]]
    problems = tuple(_overcommitted(snapshot, {model.name: needs[model.name][0] for model in pinned}))
    if problems:
        return WarmCheck(problems)
    search = _Search({gpu: capacity_bytes(snapshot, gpu) for gpu in snapshot.gpus})
    ordered = sorted((needs[model.name] for model in distinct if needs[model.name]), key=_by_difficulty)
    if search.fits(ordered):
        return WarmCheck()
    if search.steps > _STEPS_MAX:
        return WarmCheck(unchecked=("whether all models with keep_warm fit at the same time: too many arrangements",))
    return WarmCheck(warnings=(_cannot_all_be_held(snapshot, needs),))


def _needs(snapshot: Snapshot, engine: SchedulingRules, model: WarmModel) -> Iterator[Need]:
    """What the model takes on each set of GPUs that may hold it, with one slot, smallest sets first."""
    pin = snapshot.policy.pins.get(model.facts.name)
    for size in sizes(snapshot):
        for candidate in candidates_of_size(snapshot, size, Bounds(model.facts.name, pin)):
            spec = replace(candidate.spec, num_parallel=1)
            context = engine.context_length(model.options, model.facts, spec)
            needed = engine.estimate_bytes(model.facts, spec, context, snapshot)
            need = dict(zip(spec.gpus, needed, strict=True))
            if all(size <= capacity_bytes(snapshot, gpu) for gpu, size in need.items()) or model.is_pinned:
                yield need


def _by_difficulty(needs: Sequence[Need]) -> tuple[int, int]:
    """Models with few choices first, then large ones: the search then fails early."""
    return len(needs), -sum(needs[0].values())


@dataclass(slots=True)
class _Search:
    """Depth-first search for one set of GPUs per model."""

    free: dict[GpuUuid, int]
    steps: int = 0

    def fits(self, models: Sequence[Sequence[Need]]) -> bool:
        if not models:
            return True
        for need in models[0]:
            self.steps += 1
            if self.steps > _STEPS_MAX:
                return False
            if all(self.free.get(gpu, 0) >= size for gpu, size in need.items()):
                self._take(need, 1)
                if self.fits(models[1:]):
                    return True
                self._take(need, -1)
        return False

    def _take(self, need: Need, times: int) -> None:
        for gpu, size in need.items():
            self.free[gpu] -= times * size


def _overcommitted(snapshot: Snapshot, needs: Mapping[str, Need]) -> Iterator[str]:
    """A sentence for each GPU that cannot hold all models that are pinned to it and kept warm."""
    for gpu in sorted({gpu for need in needs.values() for gpu in need}):
        names = [name for name, need in needs.items() if gpu in need]
        size = sum(needs[name][gpu] for name in names)
        if len(names) > 1 and size > capacity_bytes(snapshot, gpu):
            keys = " and ".join(f"models.{name}" for name in names)
            yield f"{keys} cannot be kept warm together: {explain_shortfall(snapshot, [(gpu, size)])}"


def _cannot_all_be_held(snapshot: Snapshot, needs: Mapping[str, Sequence[Need]]) -> str:
    sizes_text = ", ".join(f"models.{name} {bytes_text(sum(each[0].values()))}" for name, each in needs.items() if each)
    gpus = sorted(snapshot.gpus.values(), key=lambda gpu: gpu.index)
    room = ", ".join(
        f"GPU {gpu_label(snapshot, gpu.uuid)} {bytes_text(capacity_bytes(snapshot, gpu.uuid))}" for gpu in gpus
    )
    return (
        f"the models with keep_warm cannot all be held at the same time: they need {sizes_text}; the GPUs can give: "
        f"{room}"
    )
