"""What a loaded model really holds on each GPU of the simulated and the emulated machine.

Written apart from the router's estimator (`engines/ollama/memory_estimate.py`), from which nothing is imported: an
estimator that shares its formulas with the world that it is tried in can never be seen to be wrong. The figures here
are fitted to the loads in docs/measured/loads.json (tests/lab/simulator/test_true_footprint.py), and each load deviates
from them by a few percent that nobody can know beforehand (`deviation`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from router.domain.model import ModelFacts

MIB = 2.0**20

CUDA_CONTEXT_BYTES = 440 * 2**20
"""A process's CUDA context on one GPU: between the 297 MiB of an A40 and the 456 of a 4090."""
_BLACKWELL_CONTEXT_BYTES = 740 * 2**20
"""708 to 753 MiB were seen on a Blackwell workstation."""

_BYTES_PER_ELEMENT: Mapping[str, float] = {"": 2.0, "f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 1.0625, "q4_0": 0.5625}
_STEP = 256

_RECENT: tuple[int, ...] = (0, 31)
_SEPARATE: tuple[int, ...] = (0, 30)


@dataclass(frozen=True, slots=True)
class LoadShape:
    """How a server loaded a model."""

    context_length: int
    """Tokens of one slot."""
    slots: int = 1
    kv_cache_type: str = "f16"
    flash_attention: bool = True
    batch_tokens: int = 512
    version: tuple[int, ...] = (0, 24, 0)
    own_engine: bool = False
    """Ollama's own engine, up to 0.24, instead of llama.cpp."""
    cuda_context_bytes: int = CUDA_CONTEXT_BYTES
    """On each GPU with a layer."""
    size_ratio: float = 1.0
    """What this load takes of the figures computed here (see `deviation`)."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """Layers with a window: in each run of `period` layers all but the last have one."""

    period: int
    kept_tokens: int = 0
    """What the own engine keeps of them, if more than the window."""
    since: tuple[int, ...] = (0, 0)


_WINDOWS: Mapping[str, _Windows] = {
    "gemma2": _Windows(2, since=(0, 30)),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(6, kept_tokens=4096),
    "gptoss": _Windows(2, kept_tokens=4096),
    "gpt-oss": _Windows(2, kept_tokens=4096),
    "cohere2": _Windows(4, since=(0, 30)),
}
_ENCODERS = ("bert", "nomic-bert", "jina-bert-v2", "nomic-bert-moe")


def cuda_context_bytes(compute_capability: tuple[int, int]) -> int:
    """CUDA context of a process on a GPU of that generation."""
    return _BLACKWELL_CONTEXT_BYTES if compute_capability >= (10, 0) else CUDA_CONTEXT_BYTES


@lru_cache(maxsize=4096)
def true_gpu_bytes(model: ModelFacts, shape: LoadShape, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes on each GPU. `layers` counts units on each, in order, the output layer being the last of all
    `model.layers + 1`; fewer in sum means that the rest is on the CPU. A GPU without a layer holds nothing."""
    units, weights_of = unit_bytes(model, shape), _unit_weights(model, shape)
    with_layers = [index for index, count in enumerate(layers) if count > 0]
    graph = _graph_mib(model, shape, len(with_layers)) * MIB
    # llama-server puts the image encoder on its first GPU, the own engine beside the output layer (`output.bts`).
    encoder_gpu = (with_layers[0] if _has_clip(model, shape) else with_layers[-1]) if with_layers else -1
    sizes: list[int] = []
    start = 0
    for index, count in enumerate(layers):
        stop = min(len(units), start + max(0, count))
        size, weights = sum(units[start:stop]), sum(weights_of[start:stop])
        if count > 0:
            size += graph + shape.cuda_context_bytes
            size += _encoder_bytes(model, shape) if index == encoder_gpu else 0
            size += _draft_bytes(model, shape) if stop == len(units) else 0
        # The weights of a file are known to the byte; what is around them deviates.
        sizes.append(int(weights + (size - weights) * shape.size_ratio))
        start = stop
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class GpuBuffers:
    """What a load holds on one GPU beside the CUDA context, as llama-server prints it."""

    model_bytes: int
    cache_bytes: int
    compute_bytes: int


def true_gpu_buffers(model: ModelFacts, shape: LoadShape, layers: Sequence[int]) -> tuple[GpuBuffers, ...]:
    """The parts of `true_gpu_bytes` on each GPU; zeros on one without a layer."""
    weights_of = _unit_weights(model, shape)
    buffers: list[GpuBuffers] = []
    start = 0
    for count, total in zip(layers, true_gpu_bytes(model, shape, tuple(layers)), strict=True):
        stop = min(len(weights_of), start + max(0, count))
        weights = int(sum(weights_of[start:stop]))
        cached_layers = range(start, min(stop, model.layers))
        cache = int(sum(_layer_cache(model, shape, layer) for layer in cached_layers) * shape.size_ratio)
        context = int(shape.cuda_context_bytes * shape.size_ratio) if count > 0 else 0
        buffers.append(GpuBuffers(weights, cache, max(0, total - weights - cache - context)))
        start = stop
    return tuple(buffers)


def true_host_bytes(model: ModelFacts, shape: LoadShape, layers: Sequence[int]) -> int:
    """Host memory of the layers that `layers` leaves for the CPU, with their cache."""
    return int(sum(unit_bytes(model, shape)[sum(layers) :]) * shape.size_ratio)


def cache_bytes_of(model: ModelFacts, shape: LoadShape) -> int:
    """KV cache and recurrent state of all layers."""
    return int(sum(_layer_cache(model, shape, layer) for layer in range(model.layers)))


def graph_bytes_of(model: ModelFacts, shape: LoadShape, gpus: int = 1) -> int:
    """Working memory on one of so many GPUs."""
    return int(_graph_mib(model, shape, gpus) * MIB)


DEVIATION_SHARE = 0.04


def deviation(seed: int, model: ModelFacts, load: int, share: float = DEVIATION_SHARE) -> float:
    """What a load takes as a ratio of the figures above: within `share` by model (three quarters of it) and load, and
    for one model in ten 15 % more. The same for the same seed, model and load."""
    by_model, by_load = chance(seed, model.blob), chance(seed, f"{model.blob}/{load}")
    surprise = 1.15 if chance(seed, f"{model.blob}/surprise") < 0.1 else 1.0
    return surprise * (1.0 + share * (1.5 * (by_model - 0.5) + 0.5 * (by_load - 0.5)))


def chance(seed: int, text: str) -> float:
    """A number from 0 to 1, the same for the same seed and text."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


@lru_cache(maxsize=4096)
def unit_bytes(model: ModelFacts, shape: LoadShape) -> tuple[float, ...]:
    """Weights and cache of each layer, then the output layer."""
    weights = _unit_weights(model, shape)
    return (*(weights[layer] + _layer_cache(model, shape, layer) for layer in range(model.layers)), weights[-1])


def _unit_weights(model: ModelFacts, shape: LoadShape) -> tuple[float, ...]:
    """Weights of each layer, then of the output layer."""
    table = model.vocabulary_size * model.embedding_length
    host = model.input_bytes if model.input_bytes is not None else table * 9 // 16
    output = model.output_bytes if model.output_bytes is not None else table * 105 // 128
    beside = model.projector_bytes if _has_clip(model, shape) else 0
    if not shape.own_engine and shape.version >= _SEPARATE:
        host, output = host + model.per_layer_input_bytes, output - model.per_layer_input_bytes
    output = min(max(0, output - beside), model.weights_bytes // 2)
    body = max(0, model.weights_bytes - min(host, model.weights_bytes // 2) - output - beside)
    each = body / max(1, model.layers)
    return (each,) * model.layers + (float(output),)


def _layer_cache(model: ModelFacts, shape: LoadShape, layer: int) -> float:
    if model.architecture in _ENCODERS or layer >= model.layers - model.shared_kv_layers:
        return 0.0
    heads = model.head_count_kv[layer] if layer < len(model.head_count_kv) else model.head_count
    if heads == 0 or (model.full_attention_interval and (layer + 1) % model.full_attention_interval):
        return 4.0 * model.recurrent_state_elements * shape.slots
    each = _BYTES_PER_ELEMENT.get(shape.kv_cache_type, 2.0)
    whole = _up(shape.context_length) * shape.slots
    windows = _WINDOWS.get(model.architecture)
    if windows is None or not model.sliding_window or not _slides(model, shape, windows, layer):
        return heads * (model.key_length + model.value_length) * each * whole
    key, value = model.key_length_swa or model.key_length, model.value_length_swa or model.value_length
    if shape.own_engine:
        kept = _up(shape.slots * max(model.sliding_window, windows.kept_tokens) + shape.batch_tokens)
    else:
        kept = shape.slots * _up(min(shape.context_length, model.sliding_window + shape.batch_tokens))
    return heads * (key + value) * each * min(whole, kept)


def _slides(model: ModelFacts, shape: LoadShape, windows: _Windows, layer: int) -> bool:
    if not shape.own_engine and shape.version < windows.since:
        return False
    if len(model.sliding_layers) == model.layers:
        return model.sliding_layers[layer]
    return layer % windows.period != windows.period - 1


def _graph_mib(model: ModelFacts, shape: LoadShape, gpus: int) -> float:
    """MiB of working memory on one GPU: activations of a batch, the attention mask or all heads' scores, logits."""
    tokens = shape.context_length * (1 if shape.version >= _SEPARATE else shape.slots)
    batch = min(shape.batch_tokens, shape.context_length * shape.slots)
    if model.architecture in _ENCODERS:
        tokens = batch
    cells = batch * tokens / MIB
    width, wide = model.embedding_length, model.feed_forward_length or 4 * model.embedding_length
    kib = 4.0 * batch / MIB
    if shape.own_engine:
        return _own_graph_mib(model, shape, kib, cells)
    if not shape.flash_attention:
        queries = max(width, model.head_count * model.key_length)
        found = kib * 2 * (width + queries) + 4.0 * cells * (model.head_count + 1)
    elif shape.version >= _RECENT:
        found = kib * (3 * wide + 4 * width) + 2.0 * cells
    else:
        found = kib * 2 * wide + 6.0 * cells
    if shape.version < _RECENT and model.architecture not in _ENCODERS:
        found = max(found, kib * (width + model.vocabulary_size))
    if gpus > 1:
        is_small_mask = shape.flash_attention and shape.version >= _RECENT
        found += 6.0 * cells if is_small_mask else 12.0 * (cells + batch * width / MIB)
    return found


def _own_graph_mib(model: ModelFacts, shape: LoadShape, kib: float, cells: float) -> float:
    width, wide = model.embedding_length, model.feed_forward_length or 4 * model.embedding_length
    if model.architecture in ("gptoss", "gpt-oss"):
        return 110 + 4 * shape.slots + shape.context_length * shape.slots / 1024
    if model.architecture in _ENCODERS:
        return 18.0
    if shape.flash_attention:
        experts = 4.2 * model.expert_used_count * width  # 324 MiB for gemma4:26b at 32k
        return 18.0 + kib * (3 * wide + 4 * width + experts) + 6.0 * cells
    heads = min(model.head_count_kv or (model.head_count,))
    copies = 4.0 * shape.context_length * shape.slots * heads * (model.key_length + model.value_length) / MIB
    return kib * 4 * width + 4.0 * cells * (model.head_count + 1) + copies


def _has_clip(model: ModelFacts, shape: LoadShape) -> bool:
    return model.has_vision and not shape.own_engine and shape.version >= _SEPARATE


def _encoder_bytes(model: ModelFacts, shape: LoadShape) -> float:
    """Image encoder: its weights where llama-server loads them beside the model, and its graph."""
    if not model.has_vision:
        return 0.0
    if _has_clip(model, shape):
        return model.projector_bytes + 700 * MIB
    if not shape.own_engine or model.architecture == "gemma4":
        return 0.0
    return (5800 if model.architecture == "qwen25vl" and shape.version >= (0, 13, 4) else 1350) * MIB


def _draft_bytes(model: ModelFacts, shape: LoadShape) -> float:
    if not model.nextn_layers or shape.version < _RECENT:
        return 0.0
    cell = 2 * max(model.head_count_kv, default=model.head_count) * (model.key_length + model.value_length)
    return model.nextn_layers * cell * _up(shape.context_length) * shape.slots + 130 * MIB


def _up(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
