"""Predicts what a server does with a load by its own rules: layers left on the CPU, and use of one GPU of several.

The router overrides the first by requesting all layers on GPUs. The second has to be taken into account, unless the
server is configured to spread. Servers up to 0.24 overestimate, and use the fewest GPUs that hold all layers. Servers
from 0.30 on use one GPU if their rough prediction is within 80 % of its free memory, otherwise all, and llama.cpp then
fits what it can.

Sources: Ollama v0.24, `llm/server.go`, `discover/gpu.go`, `fs/ggml/ggml.go` (GraphSize); v0.33, `server/sched.go`;
llama.cpp, `--fit-target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.architectures import OLLAMA_ENGINE_ARCHITECTURES, backend_of
from router.engines.ollama.compute_buffer import MIB, GraphShape, compute_buffer_bytes
from router.engines.ollama.kv_cache import layer_cache_bytes
from router.engines.ollama.memory_estimate import (
    CUDA_CONTEXT_BYTES,
    DEFAULT_BATCH_TOKENS,
    batch_tokens,
    effective_kv_cache_type,
    layer_weights_bytes,
    output_on_gpus_bytes,
    predicted_bytes,
    uses_flash_attention,
    weights_on_gpus_bytes,
)
from router.engines.ollama.runner_options import sets_num_gpu, slots_of
from router.engines.ollama.server_version import LLAMA_SERVER_SINCE, parse_version, version_or_default

FORCE_SPREAD = {"OLLAMA_SCHED_SPREAD": "1"}
"""Environment that makes a server use all its GPUs."""
ONE_GPU_SHARE = 0.8
"""Share of a GPU's free memory up to which servers from 0.30 on place a predicted model on that GPU alone."""
FIT_TARGET_BYTES = 1024 * MIB
"""Default of llama.cpp's `--fit-target`: memory left free on each GPU."""


class OffloadPrediction(NamedTuple):
    """Number of layers that a server would put on GPUs by itself, and of all layers; the output layer is included."""

    on_gpus: int
    layers: int


def predict_offload(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int,
    free_bytes: Sequence[int],
) -> OffloadPrediction | None:  # fmt: skip
    """Prediction for a server without other models and a request without `num_gpu`.

    `free_bytes`: on each GPU of `spec`. Returns None if the version or the layers are unknown, if the instance has no
    GPUs, or if a server up to 0.24 measures the model by allocating.
    """
    number = parse_version(version)
    if number is None or not free_bytes or not model.layers:
        return None
    if number >= LLAMA_SERVER_SINCE:
        return _predict_0_30(model, spec, version, context_length, slots, free_bytes)
    if model.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        return None
    return _predict_0_24(model, spec, version, context_length, slots, free_bytes)


def explain_override(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> str:
    """Text to append to the reason of a load that the server would spill by itself; otherwise ""."""
    view = snapshot.instances.get(spec.name)
    version = view.version if view is not None else None
    gpus = [snapshot.gpus.get(uuid) for uuid in spec.gpus]
    if sets_num_gpu(model) or None in gpus:
        return ""
    free = [gpu.memory_free_bytes for gpu in gpus if gpu is not None]
    prediction = predict_offload(model, spec, version, context_length, slots_of(model, spec), free)
    if prediction is None or prediction.on_gpus == prediction.layers:
        return ""
    on_cpu = prediction.layers - prediction.on_gpus
    return f"; {version} by itself would leave {on_cpu} of {prediction.layers} layers on the CPU: all are asked for"


def may_take_one_gpu(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int,
    total_bytes: Sequence[int],
) -> tuple[bool, ...]:  # fmt: skip
    """For each GPU of a multi-GPU instance: whether the server could put the whole model on it alone, if it is empty.

    This cannot be prevented by options of the request. Which GPU is used depends on what is free at the time of the
    load. Servers up to 0.24 add GPUs one by one until they hold all layers (llm/server.go, `assignLayers`). What they
    keep free besides the layers differs by engine; only the CUDA context is counted, so that no case is missed.
    """
    if len(total_bytes) < 2 or forces_spread(spec):
        return (False,) * len(total_bytes)
    number = parse_version(version)
    if number is not None and number >= LLAMA_SERVER_SINCE:
        needed = predicted_bytes(model, context_length * slots) / ONE_GPU_SHARE
    else:
        needed = weights_on_gpus_bytes(model) + CUDA_CONTEXT_BYTES
        needed += sum(_layer_caches(model, spec, version, context_length, slots, DEFAULT_BATCH_TOKENS))
    return tuple(needed <= total for total in total_bytes)


def _predict_0_30(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int, free: Sequence[int]
) -> OffloadPrediction:
    best = max(free)
    alone = predicted_bytes(model, context_length * slots) <= ONE_GPU_SHARE * best and not forces_spread(spec)
    used = [best] if alone else free
    batch = batch_tokens(model, context_length, slots, version, spec.flash_attention, free)
    flash, number = uses_flash_attention(model, spec.flash_attention, version), version_or_default(version)
    shape = GraphShape(context_length, slots, flash, batch, backend_of(model, number), number, len(used))
    fixed = compute_buffer_bytes(model, shape) + CUDA_CONTEXT_BYTES + FIT_TARGET_BYTES
    unit = _unit_bytes(model, spec, version, context_length, slots, batch)
    room = sum(max(0, gpu - fixed) // unit for gpu in used)
    return OffloadPrediction(min(model.layers + 1, room), model.layers + 1)


def _predict_0_24(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int, free: Sequence[int]
) -> OffloadPrediction:
    unit = _unit_bytes(model, spec, version, context_length, slots, DEFAULT_BATCH_TOKENS)
    fixed = graph_bytes(model, context_length * slots) + unit + CUDA_CONTEXT_BYTES + _overhead_bytes(spec)
    room = sum(max(0, free_bytes - fixed) // unit for free_bytes in free)
    layers = model.layers + 1
    surplus = max(0, -(-output_on_gpus_bytes(model) // unit) - 1)  # layers that the output needs the room of, besides 1
    if room >= layers + surplus:
        return OffloadPrediction(layers, layers)
    return OffloadPrediction(min(room, model.layers), layers)


def _unit_bytes(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int, batch: int
) -> int:
    """The largest layer with its part of the cache."""
    caches = _layer_caches(model, spec, version, context_length, slots, batch)
    return max(1, *(w + c for w, c in zip(layer_weights_bytes(model), caches, strict=True)))


def _layer_caches(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int, batch: int
) -> tuple[int, ...]:
    number = version_or_default(version)
    cache = effective_kv_cache_type(model, spec.kv_cache_type, spec.flash_attention, version)
    return layer_cache_bytes(model, context_length, slots, cache, batch, backend_of(model, number), number)


def graph_bytes(model: ModelFacts, context_tokens: int, batch: int = DEFAULT_BATCH_TOKENS) -> int:
    """Compute graph in bytes as estimated by 0.24 for llama.cpp's engine; flash attention does not reduce it.

    `context_tokens`: of all slots together.
    """
    unit, width, heads = 4 * batch, model.embedding_length, model.head_count
    whole = unit * (width + model.vocabulary_size)
    if model.architecture == "qwen2":
        return max(whole, unit * (1 + 2 * width + context_tokens * (1 + heads)))
    return max(unit * (1 + 4 * width + context_tokens * (1 + heads)), whole)


def _overhead_bytes(spec: InstanceSpec) -> int:
    text = spec.environment.get("OLLAMA_GPU_OVERHEAD", "")
    return int(text) if text.isdecimal() else 0


def forces_spread(spec: InstanceSpec) -> bool:
    """Returns True if the server is configured to use all its GPUs."""
    return spec.environment.get("OLLAMA_SCHED_SPREAD", "").lower() in ("1", "true", "t")
