"""How an Ollama server estimates a model's memory and places its layers.

Two generations: up to v0.24 a generous estimate and the fewest GPUs that hold all layers; from v0.30 a rough prediction
with an 80 % rule, then llama.cpp's fit. Each function names its source. The true sizes are in
`router.lab.simulator.true_footprint` and differ on purpose. Two servers know them: Ollama's own engine allocates before
it decides, and llama.cpp's fit measures. Pure: the same inputs give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts
from router.engines.ollama import offload_rules
from router.engines.ollama.ggml_types import cache_bytes
from router.engines.ollama.memory_estimate import CUDA_CONTEXT_BYTES, split_by
from router.engines.ollama.offload_rules import FIT_TARGET_BYTES, OLLAMA_ENGINE_ARCHITECTURES, ONE_GPU_SHARE
from router.engines.ollama.tensor_split import shares_for
from router.lab.simulator.true_footprint import LoadShape, graph_bytes_of, true_gpu_bytes, true_host_bytes, unit_bytes
from router.lab.simulator.world import input_bytes

MIB = 1024**2

KEPT_FREE_BYTES = CUDA_CONTEXT_BYTES
"""`minimumMemory` of a CUDA GPU (discover, v0.24)."""
_MINIMUM_BATCH, _SMALL_GPU_BATCH = 512, 256
_SMALL_GPU_BYTES = 8 * 1024**3
_LARGE_BATCHES = {2048: (0.6, 2048 * MIB), 1024: (0.75, 768 * MIB)}
"""Batch size -> (maximal share of free memory for the prediction, extra bytes the batch needs)."""


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """One visible GPU as the server sees it."""

    total_bytes: int
    free_bytes: int
    bandwidth_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The model to load and the settings that affect its placement."""

    model: ModelFacts
    shape: LoadShape
    version: tuple[int, ...] = (0, 24, 0)
    num_gpu: int = -1
    """Requested layers on the GPUs; -1: the server decides."""
    main_gpu: int = 0
    spread: bool = False
    tensor_split: tuple[float, ...] = ()
    """`LLAMA_ARG_TENSOR_SPLIT`, used by llama-server (from 0.30): shares of the GPUs; empty: by free memory."""
    overhead_bytes: int = 0
    has_others: bool = False
    """Whether other models are loaded in the same server."""
    is_batch_given: bool = False
    """Whether the request sets `num_batch`."""
    host_free_bytes: int = 1 << 62


@dataclass(frozen=True, slots=True)
class Plan:
    """Units (layers, then the output layer) on each GPU, in the order given; the rest is on the CPU."""

    layers: tuple[int, ...]
    must_evict: bool = False
    """Another model must be evicted first."""
    error: str | None = None
    """Set if the server refuses the load, with status 500 and this message."""

    @property
    def on_gpus(self) -> int:
        return sum(self.layers)


def default_context(total_vram_bytes: int, version: tuple[int, ...], overhead_bytes: int = 0) -> int:
    """Default context length in tokens, by the total visible VRAM (server/routes.go, v0.24); before 0.15: 4,096."""
    if version < (0, 15):
        return 4096
    visible_bytes = total_vram_bytes - overhead_bytes
    if visible_bytes < 23 * 1024 * MIB:
        return 4096
    return 32_768 if visible_bytes < 47 * 1024 * MIB else 262_144


def with_fitting_batch(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> LoadRequest:
    """Returns the request with the batch size the server will use; call before `plan`.

    From 0.30 the batch is lowered when memory is short (server/sched.go, v0.33, `automaticGenerationBatch`).
    """
    if request.version < (0, 30) or request.is_batch_given or request.model.is_embedding or not gpus:
        return request
    batch = _fitting_batch(request, [gpus[index] for index in _selected_gpus_0_30(request, gpus)])
    return replace(request, shape=replace(request.shape, batch_tokens=batch))


def plan(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """Places the model. Without GPUs, or with `num_gpu` 0, all of it goes to the CPU."""
    if not gpus or request.num_gpu == 0:
        return _check_host_memory(request, (0,) * len(gpus))
    if request.version >= (0, 30):
        return _plan_0_30(request, gpus)
    return _plan_0_24(request, gpus)


# --- up to 0.24 -------------------------------------------------------------------------------------------


def kv_layer_bytes(model: ModelFacts, shape: LoadShape) -> int:
    """KV cache of the largest layer: context x slots x (key + value length) x KV heads x bytes per element.

    As a server up to 0.24 reckons for each layer (fs/ggml, v0.24); verified with 1 to 4 slots on a running server.

    Raises:
        ValueError: ggml has no such cache type.
    """
    kv_heads = max(model.head_count_kv, default=0)
    bytes_per_token = cache_bytes(shape.kv_cache_type, model.key_length * kv_heads)
    bytes_per_token += cache_bytes(shape.kv_cache_type, model.value_length * kv_heads)
    return bytes_per_token * max(4, shape.context_length) * shape.slots


def output_bytes(model: ModelFacts) -> int:
    """Output layer: as reported, else 6.5625 bits per element."""
    default_bytes = model.vocabulary_size * model.embedding_length * 105 // 128
    return min(default_bytes if model.output_bytes is None else model.output_bytes, model.weights_bytes // 2)


def layer_bytes(model: ModelFacts) -> int:
    """Weights of one layer; all layers are assumed equal."""
    return max(0, model.weights_bytes - input_bytes(model) - output_bytes(model)) // max(1, model.layers)


def graph_bytes(model: ModelFacts, shape: LoadShape) -> int:
    """Compute graph estimate of v0.24 for the llama.cpp engine; flash attention does not lower it."""
    return offload_rules.graph_bytes(model, shape.context_length * shape.slots, shape.batch_tokens)


def booked_bytes(model: ModelFacts, shape: LoadShape, layers: Sequence[int]) -> tuple[int, ...]:
    """Bytes that a server up to 0.24 books on each GPU for a loaded runner and subtracts from free memory.

    The estimate for the llama.cpp engine, the true size for Ollama's own engine (server/sched.go, `updateFreeSpace`).
    """
    if model.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        return true_gpu_bytes(model, shape, tuple(layers))
    unit = layer_bytes(model) + kv_layer_bytes(model, shape)
    graph = graph_bytes(model, shape)
    last = max((index for index, count in enumerate(layers) if count), default=-1)
    surplus = output_bytes(model) - unit if sum(layers) > model.layers else 0
    return tuple(
        count * unit + graph + (surplus if index == last else 0) if count else 0 for index, count in enumerate(layers)
    )


def _plan_0_24(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """The fewest GPUs that hold all layers, fastest first, then most free memory (llm/server.go, v0.24)."""
    if request.num_gpu > request.model.layers and not request.has_others:
        return Plan(_even(request.model.layers + 1, len(gpus)))
    order = sorted(range(len(gpus)), key=lambda i: (-gpus[i].bandwidth_bytes_per_second, -gpus[i].free_bytes, i))
    total = request.model.layers + 1
    requested_units = total if request.num_gpu < 0 else min(request.num_gpu, total)
    for count in range(len(gpus) if request.spread else 1, len(gpus) + 1):
        units = _capacities(request, [gpus[i] for i in order[:count]])
        if sum(units) >= requested_units + (_output_surplus(request) if requested_units == total else 0):
            return _check_host_memory(
                request, _in_gpu_order(order[:count], _by_capacity(requested_units, units), len(gpus))
            )
    if request.has_others:
        return Plan((0,) * len(gpus), must_evict=True)
    units = _capacities(request, [gpus[i] for i in order])
    fitting = min(sum(units), request.model.layers, requested_units)
    return _check_host_memory(request, _in_gpu_order(order, _by_capacity(fitting, units), len(gpus)))


def _unit_bytes(request: LoadRequest) -> int:
    """One layer with its share of the KV cache."""
    return max(1, layer_bytes(request.model) + kv_layer_bytes(request.model, request.shape))


def _output_surplus(request: LoadRequest) -> int:
    """Extra units that the output layer takes compared to one layer; a server that measures has counted it."""
    if _measures(request):
        return 0
    return max(0, -(-output_bytes(request.model) // _unit_bytes(request)) - 1)


def _capacities(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """Units that fit on each GPU by the server's estimate."""
    kept_bytes = KEPT_FREE_BYTES + request.overhead_bytes
    if _measures(request):
        return _measured_capacities(request, gpus, kept_bytes)
    unit = _unit_bytes(request)
    reserved_bytes = graph_bytes(request.model, request.shape) + unit + kept_bytes
    return [max(0, (gpu.free_bytes - reserved_bytes) // unit) for gpu in gpus]


# --- from 0.30 --------------------------------------------------------------------------------------------


def predicted_bytes(model: ModelFacts, shape: LoadShape) -> int:
    """Prediction of v0.30 to v0.33: file size plus an f16 cache, by width / heads and the fewest KV heads."""
    return offload_rules.predicted_bytes(model, shape.context_length * shape.slots)


def _plan_0_30(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """One GPU if the prediction is within 80 % of its free memory, else all; then llama.cpp's fit (server/sched.go,
    v0.33)."""
    selected = _selected_gpus_0_30(request, gpus)
    free = sum(gpus[index].free_bytes for index in selected)
    if request.has_others and predicted_bytes(request.model, request.shape) > ONE_GPU_SHARE * free:
        return Plan((0,) * len(gpus), must_evict=True)
    total = request.model.layers + 1
    if request.num_gpu >= 0:
        requested_units = min(request.num_gpu, total)
        if len(selected) > 1 and any(request.tensor_split[: len(gpus)]):
            return Plan(_by_tensor_split(request, requested_units, len(gpus)))
        free_bytes = [gpus[index].free_bytes for index in selected]
        return Plan(_in_gpu_order(selected, _by_capacity(requested_units, free_bytes), len(gpus)))
    units = _fitting(request, [gpus[i] for i in selected])
    return _check_host_memory(request, _in_gpu_order(selected, _by_capacity(min(total, sum(units)), units), len(gpus)))


def _selected_gpus_0_30(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """Indices of the GPUs to use: `main_gpu` if set, the one with most free memory if the 80 % rule holds, else all."""
    if 0 < request.main_gpu < len(gpus):
        return [request.main_gpu]
    best = max(range(len(gpus)), key=lambda i: (gpus[i].free_bytes, -i))
    fits_one_gpu = predicted_bytes(request.model, request.shape) <= ONE_GPU_SHARE * gpus[best].free_bytes
    return [best] if fits_one_gpu and not request.spread else list(range(len(gpus)))


def _fitting_batch(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> int:
    """The largest batch, up to the shape's, that fits next to the prediction; without flash attention never a large one
    (`automaticGenerationBatch`, `generationBatchFits`)."""
    shape = request.shape
    if not shape.flash_attention:
        is_small = any(min(gpu.total_bytes, gpu.free_bytes) <= _SMALL_GPU_BYTES for gpu in gpus)
        return _SMALL_GPU_BATCH if is_small and shape.context_length * shape.slots > 4096 else _MINIMUM_BATCH
    free = sum(gpu.free_bytes for gpu in gpus)
    predicted = predicted_bytes(request.model, shape)
    for batch, (share, extra) in _LARGE_BATCHES.items():
        if batch <= shape.batch_tokens and predicted <= share * free and predicted + extra <= ONE_GPU_SHARE * free:
            return batch
    return _MINIMUM_BATCH


def _by_tensor_split(request: LoadRequest, units: int, gpus: int) -> tuple[int, ...]:
    """Splits the last `units` units by the configured tensor split, as llama.cpp does (`load_tensors`).

    A GPU beyond the last share gets nothing.
    """
    split = split_by(units - 1, shares_for(request.tensor_split, gpus))
    return tuple(count + (gpu == split.output_gpu) for gpu, count in enumerate(split.layers))


def _fitting(request: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """Units that llama.cpp's fit places on each GPU; it measures true sizes."""
    return _measured_capacities(request, gpus, FIT_TARGET_BYTES)


def _measures(request: LoadRequest) -> bool:
    """Whether the server allocates first, so that it knows true sizes."""
    return request.version >= (0, 30) or request.model.architecture in OLLAMA_ENGINE_ARCHITECTURES


def _measured_capacities(request: LoadRequest, gpus: Sequence[VisibleGpu], kept_bytes: int) -> list[int]:
    """Units on each GPU such that the true sizes leave `kept_bytes` free there, whichever layers it gets."""
    model, shape = request.model, request.shape
    units = unit_bytes(model, shape)
    each = max(1.0, shape.size_ratio * sum(units) / len(units))
    fixed = shape.size_ratio * (graph_bytes_of(model, shape) + shape.cuda_context_bytes)
    rooms = [gpu.free_bytes - kept_bytes for gpu in gpus]
    capacities = [max(0, int((room - fixed) // each) + 1) for room in rooms]
    while True:
        layers = _by_capacity(min(len(units), sum(capacities)), capacities)
        true_sizes = true_gpu_bytes(model, shape, tuple(layers))
        over = [gpu for gpu, size in enumerate(true_sizes) if size > rooms[gpu] and layers[gpu]]
        if not over:
            return capacities
        for gpu in over:
            capacities[gpu] = min(capacities[gpu], layers[gpu]) - 1


# --- shared -----------------------------------------------------------------------------------------------


def _even(units: int, gpus: int) -> tuple[int, ...]:
    """As even as possible; the first GPUs get the remainder."""
    each, rest = divmod(units, gpus)
    return tuple(each + (index < rest) for index in range(gpus))


def _by_capacity(units: int, capacity: Sequence[int]) -> list[int]:
    """Splits units in proportion to each GPU's capacity and never above it; equal GPUs share evenly."""
    total_capacity = sum(capacity)
    if total_capacity <= 0:
        return [0] * len(capacity)
    shares = [min(gpu_capacity, units * gpu_capacity // total_capacity) for gpu_capacity in capacity]
    while sum(shares) < units:
        index = min(
            (i for i in range(len(capacity)) if shares[i] < capacity[i]),
            key=lambda i: (shares[i] + 1) / capacity[i],
            default=None,
        )
        if index is None:
            break
        shares[index] += 1
    return shares


def _in_gpu_order(order: Sequence[int], units: Sequence[int], count: int) -> tuple[int, ...]:
    layers = [0] * count
    for index, amount in zip(order, units, strict=True):
        layers[index] = amount
    return tuple(layers)


def _check_host_memory(request: LoadRequest, layers: tuple[int, ...]) -> Plan:
    """The plan, refused if host memory cannot hold the layers left for the CPU (llm/server.go, v0.24)."""
    cpu_units = max(0, request.model.layers + 1 - sum(layers))
    unit = _unit_bytes(request)
    needed_bytes = cpu_units * unit
    if needed_bytes <= request.host_free_bytes:
        return Plan(layers)
    needed, available = human_bytes(needed_bytes), human_bytes(request.host_free_bytes)
    error = f"model requires more system memory ({needed}) than is available ({available})"
    return replace(Plan(layers), error=error)


def human_bytes(amount: int) -> str:
    """Formats bytes like Go's `format.HumanBytes2`: `71.5 GiB`."""
    for name, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if amount >= size:
            return f"{amount / size:.1f} {name}"
    return f"{amount} B"


def sizes(request: LoadRequest, layers: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Host bytes and true bytes per GPU of a plan; in `/api/ps`, `size` is their total and `size_vram` the GPU part."""
    shape = request.shape
    return true_host_bytes(request.model, shape, layers), true_gpu_bytes(request.model, shape, tuple(layers))
