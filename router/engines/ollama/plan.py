"""Which models fit on which GPUs: the estimator's figures put beside what each GPU has free.

Pure. Every byte comes from `memory_estimate.footprint`; here are only the margin and the search for the smallest set of
GPUs, the largest context and the most slots. It asks no server and reserves nothing: what a running router can load now
also depends on what is loaded already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from router.domain.footprint import GpuFootprint
from router.domain.gpu import Gpu
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.engines.ollama.architectures import is_known, margin_ratio
from router.engines.ollama.memory_estimate import (
    LoadParameters,
    batch_tokens,
    cuda_context_bytes,
    effective_kv_cache_type,
    footprint,
    is_blackwell,
    split_by,
    uses_flash_attention,
)
from router.engines.ollama.runner_options import cut_context, has_one_slot
from router.engines.ollama.server_version import LLAMA_SERVER_SINCE, version_or_default
from router.engines.ollama.tensor_split import memory_shares

SLOTS_MAX = 1024
"""`ollama.num_parallel` takes no more."""
CONTEXT_STEP_TOKENS = 256
"""Caches are padded to it, so smaller steps of context change little."""
_UNTRAINED_CONTEXT_TOKENS = 1_048_576
"""Searched up to here where the model does not tell its trained context."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How the models are to be loaded."""

    default_context_length: int
    """Tokens of one slot for a model whose Modelfile names none."""
    slots: int = 1
    context_length: int | None = None
    """For all models, instead of their own and the default."""
    kv_cache_type: str = "f16"
    flash_attention: bool | None = None
    version: str | None = None
    is_version_assumed: bool = False
    """Nobody named it, and no server is installed."""
    batch: int | None = None
    """None: the Modelfile's, else the server's choice."""
    policy: Policy = field(default_factory=Policy)
    """Its margin on each GPU, and the architectures that get one slot."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """One model's part on one GPU."""

    gpu: Gpu
    """With the memory that is free before this model is loaded."""
    layers: int
    has_output: bool
    footprint: GpuFootprint
    margin_bytes: int

    @property
    def missing_bytes(self) -> int:
        """What the GPU lacks for the model and the margin; 0 if both fit."""
        return max(0, self.footprint.total_bytes + self.margin_bytes - self.gpu.memory_free_bytes)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Where a model goes; on all GPUs if it fits nowhere."""

    facts: ModelFacts
    load: LoadParameters
    gpus: tuple[GpuPlan, ...]
    flash_attention: bool
    """Whether the server uses it."""
    kv_cache_type: str
    """The type that the server uses."""
    is_known_architecture: bool
    is_version_assumed: bool = False
    context_length_max: int = 0
    """Most tokens of one slot that fit on these GPUs next to the other models, with this number of slots; 0: none."""
    slots_max: int = 0
    """Most slots of this context that fit there; 0: none."""

    @property
    def fits(self) -> bool:
        return not any(gpu.missing_bytes for gpu in self.gpus)


def plan_models(models: Sequence[ModelFacts], gpus: Sequence[Gpu], options: PlanOptions) -> tuple[ModelPlan, ...]:
    """A plan for each model, in the order given, all loaded at the same time.

    Models are placed one after another, the largest file first, each on the fewest GPUs that hold it; among sets of as
    many GPUs, on the one with the least free memory. A model that fits nowhere takes nothing from the others.

    Raises:
        ValueError: no GPU, or options out of range; the text names them.
    """
    plans = _place_all(models, gpus, options)
    left = tuple(gpus)
    for plan in plans:
        left = _without(left, plan, options) if plan.fits else left
    return tuple(_with_limits(plan, left, options) for plan in plans)


def largest_context(models: Sequence[ModelFacts], gpus: Sequence[Gpu], options: PlanOptions) -> int:
    """The largest context of a slot with which all models fit at the same time; 0 if none does.

    Each model's context is cut to its trained one. Errors as `plan_models`.
    """

    def fits(context_length: int) -> bool:
        placed = _place_all(models, gpus, replace(options, context_length=context_length))
        return all(plan.fits for plan in placed)

    return _largest(fits, max((_trained_context(facts) for facts in models), default=0), CONTEXT_STEP_TOKENS)


# --- placing ----------------------------------------------------------------------------------------------------


def _place_all(models: Sequence[ModelFacts], gpus: Sequence[Gpu], options: PlanOptions) -> list[ModelPlan]:
    if not gpus:
        raise ValueError("gpus: at least one GPU is needed")
    left = tuple(gpus)
    plans: dict[int, ModelPlan] = {}
    for index in sorted(range(len(models)), key=lambda at: (-models[at].weights_bytes, at)):
        plan = _place(models[index], left, options)
        plans[index] = plan
        if plan.fits:
            left = _without(left, plan, options)
    return [plans[index] for index in range(len(models))]


def _place(facts: ModelFacts, gpus: Sequence[Gpu], options: PlanOptions) -> ModelPlan:
    for candidate in _candidate_sets(gpus):
        plan = _plan_on(facts, candidate, options)
        if plan.fits:
            return plan
    return _plan_on(facts, gpus, options)


def _candidate_sets(gpus: Sequence[Gpu]) -> Iterator[tuple[Gpu, ...]]:
    """Sets of GPUs, the smallest first, then the least free memory; of equal sets only the first."""
    for size in range(1, len(gpus) + 1):
        tried: set[tuple[tuple[int, int, bool], ...]] = set()
        for candidate in sorted(combinations(gpus, size), key=lambda each: sum(gpu.memory_free_bytes for gpu in each)):
            kind = tuple((gpu.memory_free_bytes, gpu.memory_total_bytes, is_blackwell(gpu)) for gpu in candidate)
            if kind not in tried:
                tried.add(kind)
                yield candidate


def _without(gpus: Sequence[Gpu], plan: ModelPlan, options: PlanOptions) -> tuple[Gpu, ...]:
    """The GPUs with the memory that is free once the model is loaded; what is kept free of every GPU is not taken."""
    taken = {part.gpu.uuid: _taken_bytes(part, options) for part in plan.gpus}
    return tuple(replace(gpu, memory_free_bytes=gpu.memory_free_bytes - taken.get(gpu.uuid, 0)) for gpu in gpus)


def _taken_bytes(part: GpuPlan, options: PlanOptions) -> int:
    return part.footprint.total_bytes + part.margin_bytes - options.policy.vram_margin_bytes


def _plan_on(facts: ModelFacts, gpus: Sequence[Gpu], options: PlanOptions) -> ModelPlan:
    version = options.version
    load = _load_parameters(facts, gpus, options)
    split = split_by(facts.layers, layer_shares(gpus, version))
    ratio = margin_ratio(facts)
    parts = footprint(facts, split, load).gpus
    return ModelPlan(
        facts=facts,
        load=load,
        gpus=tuple(
            GpuPlan(gpu, split.layers[index], index == split.output_gpu, part, _margin(part, ratio, options))
            for index, (gpu, part) in enumerate(zip(gpus, parts, strict=True))
        ),
        flash_attention=uses_flash_attention(facts, options.flash_attention, version),
        kv_cache_type=effective_kv_cache_type(facts, options.kv_cache_type, options.flash_attention, version),
        is_known_architecture=is_known(facts),
        is_version_assumed=options.is_version_assumed,
    )


def _margin(part: GpuFootprint, ratio: float, options: PlanOptions) -> int:
    return options.policy.vram_margin_bytes + int(part.total_bytes * ratio)


def _load_parameters(facts: ModelFacts, gpus: Sequence[Gpu], options: PlanOptions) -> LoadParameters:
    context_length, slots = context_length_of(facts, options), slots_of(facts, options)
    free = tuple(max(0, gpu.memory_free_bytes) for gpu in gpus)
    batch = options.batch or _own_number(facts, "num_batch")
    if batch is None:
        batch = batch_tokens(facts, context_length, slots, options.version, options.flash_attention, free)
    return LoadParameters(
        context_length=context_length,
        slots=slots,
        kv_cache_type=options.kv_cache_type,
        flash_attention=options.flash_attention,
        batch=batch,
        version=options.version,
        cuda_context_bytes=cuda_context_bytes(gpus),
    )


def context_length_of(facts: ModelFacts, options: PlanOptions) -> int:
    """Tokens of one slot: as given, else the Modelfile's, else the default; cut to the trained context."""
    return cut_context(facts, options.context_length or _own_number(facts, "num_ctx") or options.default_context_length)


def slots_of(facts: ModelFacts, options: PlanOptions) -> int:
    """Slots that a server gives the model: embedding models and some architectures always get one."""
    return 1 if has_one_slot(facts) else options.slots


def _own_number(facts: ModelFacts, name: str) -> int | None:
    """A whole number above 0 among the Modelfile's parameters."""
    text = dict(facts.parameters).get(name, "")
    return int(text) if text.isdecimal() and int(text) else None


def layer_shares(gpus: Sequence[Gpu], version: str | None) -> tuple[float, ...]:
    """In what shares the router has a server split layers: by memory from 0.30, before evenly."""
    if version_or_default(version) < LLAMA_SERVER_SINCE:
        return (1.0,) * len(gpus)
    return memory_shares(tuple(gpu.memory_total_bytes for gpu in gpus))


# --- limits -----------------------------------------------------------------------------------------------------


def _with_limits(plan: ModelPlan, left: Sequence[Gpu], options: PlanOptions) -> ModelPlan:
    """The plan with the largest context and number of slots that fit on its GPUs next to all other models.

    `left`: all GPUs with the memory that is free once every model is loaded.
    """
    gpus = [part.gpu for part in plan.gpus]
    if plan.fits:
        free = {gpu.uuid: gpu.memory_free_bytes for gpu in left}
        taken = {part.gpu.uuid: _taken_bytes(part, options) for part in plan.gpus}
        gpus = [replace(gpu, memory_free_bytes=free[gpu.uuid] + taken[gpu.uuid]) for gpu in gpus]

    def fits_context(context_length: int) -> bool:
        return _plan_on(plan.facts, gpus, replace(options, context_length=context_length)).fits

    def fits_slots(slots: int) -> bool:
        return _plan_on(plan.facts, gpus, replace(options, slots=slots)).fits

    context_length = max(
        _largest(fits_context, _trained_context(plan.facts), CONTEXT_STEP_TOKENS),
        plan.load.context_length if plan.fits else 0,
    )
    slots_limit = 1 if slots_of(plan.facts, replace(options, slots=2)) == 1 else SLOTS_MAX
    slots = max(_largest(fits_slots, slots_limit, 1), plan.load.slots if plan.fits else 0)
    return replace(plan, context_length_max=context_length, slots_max=slots)


def _trained_context(facts: ModelFacts) -> int:
    return facts.context_length or _UNTRAINED_CONTEXT_TOKENS


def _largest(fits: Callable[[int], bool], limit: int, step: int) -> int:
    """The largest multiple of `step`, or `limit` itself, that fits; 0 if none does. Larger values are taken not to fit
    once one does not."""
    if limit > 0 and fits(limit):
        return limit
    low, high = 0, -(-limit // step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def units_on_gpus(plan: ModelPlan) -> tuple[int, ...]:
    """Layers on each GPU, with the output layer counted as one."""
    return tuple(part.layers + part.has_output for part in plan.gpus)
