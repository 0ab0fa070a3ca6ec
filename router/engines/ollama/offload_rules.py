"""What a server would do with a load by its own rules: how many layers it would leave on the CPU, and whether it would
take one GPU of several, unless it is told to spread.

The router asks for all layers with each load, which overrules the first; the second it has to reckon with. A server of
up to 0.24 estimates widely and takes the fewest GPUs that hold all layers; one of 0.30 and later takes one GPU where
its rough prediction is within 80 % of what is free there, else all, and lets llama.cpp fit what it can. Nothing is
decided here.

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
"""What keeps a server from taking one GPU of several."""
ONE_GPU_SHARE = 0.8
"""Of a GPU's free memory: what from 0.30 a model may be predicted to take for it to go to that GPU alone."""
FIT_TARGET_BYTES = 1024 * MIB
"""llama.cpp's `--fit-target`: what its fit leaves free on each GPU."""


class OffloadPrediction(NamedTuple):
    """Layers, the output counted as one, that a server left to itself would put on GPUs, of how many."""

    on_gpus: int
    layers: int


def predict_offload(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int,
    free_bytes: Sequence[int],
) -> OffloadPrediction | None:  # fmt: skip
    """With so much free on each GPU of `spec`, no other model in that server, and no `num_gpu` in the request.

    None where it is not known: an unknown version, an instance without GPUs, a model whose layers are unknown, or one
    that a server up to 0.24 measures by allocating.
    """
    number = parse_version(version)
    if number is None or not free_bytes or not model.layers:
        return None
    if number >= LLAMA_SERVER_SINCE:
        return _answer_0_30(model, spec, version, context_length, slots, free_bytes)
    if model.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        return None
    return _answer_0_24(model, spec, version, context_length, slots, free_bytes)


def explain_override(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> str:
    """Words for a load that the server would spill: what it would do, to go on with a load's reason; else ""."""
    view = snapshot.instances.get(spec.name)
    version = view.version if view is not None else None
    gpus = [snapshot.gpus.get(uuid) for uuid in spec.gpus]
    if sets_num_gpu(model) or None in gpus:
        return ""
    free = [gpu.memory_free_bytes for gpu in gpus if gpu is not None]
    answer = predict_offload(model, spec, version, context_length, slots_of(model, spec), free)
    if answer is None or answer.on_gpus == answer.layers:
        return ""
    left = answer.layers - answer.on_gpus
    return f"; {version} by itself would leave {left} of {answer.layers} layers on the CPU: all are asked for"


def may_take_one_gpu(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int,
    total_bytes: Sequence[int],
) -> tuple[bool, ...]:  # fmt: skip
    """For each GPU of an instance over several: whether the server could put the whole model there, whatever the
    request asks for, if the GPU were empty. Which one it takes depends on what is free when it loads.

    Up to 0.24 GPUs are added one by one until they hold all layers asked for (llm/server.go, `assignLayers`). What
    such a server keeps free beside the layers differs by engine: only the context is counted, so that none is missed.
    """
    if len(total_bytes) < 2 or forces_spread(spec):
        return (False,) * len(total_bytes)
    number = parse_version(version)
    if number is not None and number >= LLAMA_SERVER_SINCE:
        least = predicted_bytes(model, context_length * slots) / ONE_GPU_SHARE
    else:
        least = weights_on_gpus_bytes(model) + CUDA_CONTEXT_BYTES
        least += sum(_layer_caches(model, spec, version, context_length, slots, DEFAULT_BATCH_TOKENS))
    return tuple(least <= total for total in total_bytes)


def _answer_0_30(
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


def _answer_0_24(
    model: ModelFacts, spec: InstanceSpec, version: str | None, context_length: int, slots: int, free: Sequence[int]
) -> OffloadPrediction:
    unit = _unit_bytes(model, spec, version, context_length, slots, DEFAULT_BATCH_TOKENS)
    kept = graph_bytes(model, context_length * slots) + unit + CUDA_CONTEXT_BYTES + _overhead_bytes(spec)
    room = sum(max(0, gpu - kept) // unit for gpu in free)
    whole = model.layers + 1
    surplus = max(0, -(-output_on_gpus_bytes(model) // unit) - 1)  # the output takes the room of so many layers more
    if room >= whole + surplus:
        return OffloadPrediction(whole, whole)
    return OffloadPrediction(min(room, model.layers), whole)


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
    """The compute graph as 0.24 estimates it for llama.cpp's engine; flash attention does not lower it.
    `context_tokens`: of all slots."""
    unit, width, heads = 4 * batch, model.embedding_length, model.head_count
    whole = unit * (width + model.vocabulary_size)
    if model.architecture == "qwen2":
        return max(whole, unit * (1 + 2 * width + context_tokens * (1 + heads)))
    return max(unit * (1 + 4 * width + context_tokens * (1 + heads)), whole)


def _overhead_bytes(spec: InstanceSpec) -> int:
    text = spec.environment.get("OLLAMA_GPU_OVERHEAD", "")
    return int(text) if text.isdecimal() else 0


def forces_spread(spec: InstanceSpec) -> bool:
    """Whether the server is told not to take one GPU of several."""
    return spec.environment.get("OLLAMA_SCHED_SPREAD", "").lower() in ("1", "true", "t")
