"""`llamayard plan` without its command line: GPUs by name or from the driver, speed estimates, the JSON document.

What fits is decided in `engines/ollama/plan.py`; this adds what only the outer layers know. Times are estimates of the
simulator's cost model, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.app.model_sources import ModelSource
from router.domain.gpu import Gpu
from router.engines.ollama.plan import GpuPlan, ModelPlan, units_on_gpus
from router.engines.ollama.server_version import UNKNOWN_COUNTS_AS, parse_version
from router.gpu.nvml import NoGpus, open_nvml
from router.lab.emulator.spec import SpecError, parse_spec
from router.lab.simulator.world import WORLD, GpuModel, load_seconds, speed

AUTO_GPUS = "auto"

_ANY_CAPABILITY = (8, 6)
_ANY_TERAFLOPS = 1.0
"""FP32 rate decides only how fast prompts are evaluated, which a plan does not tell."""


class PlanGpusError(ValueError):
    """The GPUs cannot be told; one sentence."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One model's plan with its estimated times."""

    source: ModelSource
    plan: ModelPlan
    tokens_per_second: float | None
    """One stream, short context; None if it does not fit or the bandwidth of a GPU is not known."""
    load_seconds_cold: float
    """From a disk."""
    load_seconds_warm: float
    """From the page cache."""


def planned_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs that `--gpus` names: all free if by name, as they are now if `auto`. Blocking: `auto` asks the driver.

    Raises:
        PlanGpusError: no such GPU, or no driver.
    """
    if text.strip().lower() == AUTO_GPUS:
        return _present_gpus()
    try:
        spec = parse_spec(text)
    except SpecError as error:
        raise PlanGpusError(f"--gpus {text}: {str(error).removeprefix('rig: ')}") from error
    return tuple(
        Gpu(
            uuid=uuid,
            index=index,
            name=gpu.name,
            memory_total_bytes=gpu.memory_total_bytes,
            memory_free_bytes=gpu.memory_total_bytes - gpu.memory_reserved_bytes,
            memory_used_bytes=0,
            memory_reserved_bytes=gpu.memory_reserved_bytes,
            compute_capability=gpu.compute_capability,
            memory_bus_width_bits=gpu.memory_bus_width_bits,
            memory_clock_hertz=gpu.memory_clock_hertz,
        )
        for index, (uuid, gpu) in enumerate(zip(spec.uuids, spec.gpus, strict=True))
    )


def _present_gpus() -> tuple[Gpu, ...]:
    reader = open_nvml()
    advice = "name the GPUs instead, e.g. --gpus 2x3090"
    if isinstance(reader, NoGpus):
        raise PlanGpusError(f"--gpus {AUTO_GPUS}: {reader.reason}; {advice}")
    try:
        gpus = tuple(gpu for gpu in reader.read() if gpu.error is None)
    finally:
        reader.close()
    if not gpus:
        raise PlanGpusError(f"--gpus {AUTO_GPUS}: no GPU can be read; {advice}")
    return gpus


def with_times(source: ModelSource, plan: ModelPlan) -> PlannedModel:
    """The plan with estimated times."""
    weights = plan.facts.weights_bytes
    return PlannedModel(
        source=source,
        plan=plan,
        tokens_per_second=_tokens_per_second(source, plan),
        load_seconds_cold=load_seconds(WORLD, weights, warm=False),
        load_seconds_warm=load_seconds(WORLD, weights, warm=True),
    )


def _tokens_per_second(source: ModelSource, plan: ModelPlan) -> float | None:
    gpus = [part.gpu for part in plan.gpus]
    known = [
        GpuModel(gpu.bandwidth_bytes_per_second, _ANY_TERAFLOPS, gpu.compute_capability or _ANY_CAPABILITY)
        for gpu in gpus
        if gpu.bandwidth_bytes_per_second
    ]
    if not plan.fits or plan.facts.is_embedding or len(known) < len(gpus):
        return None
    return 1.0 / speed(WORLD, plan.facts, known, units_on_gpus(plan), active_share=source.active_share).step_seconds


def plan_document(models: Sequence[PlannedModel]) -> dict[str, Any]:
    """The JSON of `llamayard plan --json`; its keys are listed in docs/footprints.md and only ever added to."""
    return {"models": [_model(model) for model in models], "fits": all(model.plan.fits for model in models)}


def _model(model: PlannedModel) -> Mapping[str, Any]:
    plan, facts = model.plan, model.plan.facts
    return {
        "name": facts.name,
        "origin": model.source.origin,
        "architecture": facts.architecture,
        "architecture_known": plan.is_known_architecture,
        "size_bytes": facts.weights_bytes,
        "fits": plan.fits,
        "gpus": [_gpu(part) for part in plan.gpus],
        "total_bytes": sum(part.footprint.total_bytes for part in plan.gpus),
        "context_length": plan.load.context_length,
        "context_length_trained": facts.context_length or None,
        "context_length_max": plan.context_length_max,
        "num_parallel": plan.load.slots,
        "num_parallel_max": plan.slots_max,
        "kv_cache_type": plan.kv_cache_type,
        "flash_attention": plan.flash_attention,
        "batch": plan.load.batch,
        "ollama_version": version_text(plan.load.version),
        "ollama_version_assumed": plan.is_version_assumed,
        "tokens_per_second_estimate": _rounded(model.tokens_per_second),
        "load_seconds_estimate": _rounded(model.load_seconds_cold),
        "load_seconds_cached_estimate": _rounded(model.load_seconds_warm),
        "notes": list(model.source.notes),
    }


def _gpu(part: GpuPlan) -> Mapping[str, Any]:
    sizes = part.footprint
    return {
        "gpu": part.gpu.index,
        "gpu_name": short_name(part.gpu),
        "layers": part.layers,
        "weights_bytes": sizes.weights_bytes,
        "kv_cache_bytes": sizes.kv_cache_bytes,
        "compute_buffer_bytes": sizes.compute_buffer_bytes,
        "recurrent_state_bytes": sizes.recurrent_state_bytes,
        "projector_bytes": sizes.projector_bytes,
        "cuda_context_bytes": sizes.cuda_context_bytes,
        "total_bytes": sizes.total_bytes,
        "margin_bytes": part.margin_bytes,
        "free_bytes": part.gpu.memory_free_bytes,
        "missing_bytes": part.missing_bytes,
    }


def version_text(version: str | None) -> str:
    """The version as given, or the one that an unknown server counts as."""
    return version if version and parse_version(version) else ".".join(map(str, UNKNOWN_COUNTS_AS))


def short_name(gpu: Gpu) -> str:
    """`RTX 3090` for `NVIDIA GeForce RTX 3090 (emulated)`."""
    return gpu.name.removesuffix(" (emulated)").removeprefix("NVIDIA ").removeprefix("GeForce ")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
