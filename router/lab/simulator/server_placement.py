"""What a server believes of a model's size, and where it therefore puts it.

Two generations: v0.24 and before estimate widely and take the fewest GPUs that hold all layers; from v0.30 a rough
prediction meets an 80 % rule, then llama.cpp fits what it can. Each function names its rule's source. The truth is
`router.lab.simulator.world`; the two differ on purpose. Pure: same facts, same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts
from router.engines.ollama import offload_rules
from router.engines.ollama.memory_estimate import CUDA_CONTEXT_BYTES, split_by
from router.engines.ollama.offload_rules import FIT_TARGET_BYTES, OLLAMA_ENGINE_ARCHITECTURES, ONE_GPU_SHARE
from router.engines.ollama.tensor_split import shares_for
from router.lab.simulator.world import (
    MIB,
    LoadShape,
    World,
    compute_buffer_bytes,
    kv_layer_bytes,
    layer_bytes,
    output_bytes,
    true_bytes,
)

KEPT_FREE_BYTES = CUDA_CONTEXT_BYTES
"""`minimumMemory` of a CUDA GPU (discover, v0.24)."""
_LEAST_BATCH, _SMALL_GPU_BATCH = 512, 256
_SMALL_GPU_BYTES = 8 * 1024**3
_LARGE_BATCHES = {2048: (0.6, 2048 * MIB), 1024: (0.75, 768 * MIB)}
"""Batch -> of the free memory, what the prediction may be for it, and what it takes beside that."""


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """One visible GPU as the server sees it."""

    total_bytes: int
    free_bytes: int
    bandwidth_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is to be loaded, and the switches that decide about it."""

    model: ModelFacts
    shape: LoadShape
    version: tuple[int, ...] = (0, 24, 0)
    num_gpu: int = -1
    """Layers wanted on the GPUs; -1: as the server decides."""
    main_gpu: int = 0
    spread: bool = False
    tensor_split: tuple[float, ...] = ()
    """`LLAMA_ARG_TENSOR_SPLIT`, which llama-server (from 0.30) heeds: shares of the GPUs; empty: by free memory."""
    overhead_bytes: int = 0
    has_others: bool = False
    """Other models are loaded in the same server."""
    is_batch_given: bool = False
    """The request names its batch."""
    host_free_bytes: int = 1 << 62


@dataclass(frozen=True, slots=True)
class Plan:
    """Units (layers, then the output layer) on each GPU in the order given; the rest is on the CPU."""

    layers: tuple[int, ...]
    must_evict: bool = False
    """Nothing is placed before another model is gone."""
    error: str | None = None
    """The server refuses at once, with this text and status 500."""

    @property
    def on_gpus(self) -> int:
        return sum(self.layers)


def default_context(total_vram_bytes: int, version: tuple[int, ...], overhead_bytes: int = 0) -> int:
    """Tokens where nothing names a context: by all VRAM the server sees (server/routes.go, v0.24); 4,096 before."""
    if version < (0, 15):
        return 4096
    seen = total_vram_bytes - overhead_bytes
    if seen < 23 * 1024 * MIB:
        return 4096
    return 32_768 if seen < 47 * 1024 * MIB else 262_144


def with_fitting_batch(ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> LoadRequest:
    """The same with the batch that the server takes; `plan` wants it so. From 0.30 a batch that the context would allow
    is lowered where memory is short (server/sched.go, v0.33, `automaticGenerationBatch`)."""
    if ask.version < (0, 30) or ask.is_batch_given or ask.model.is_embedding or not gpus:
        return ask
    batch = _fitting_batch(ask, [gpus[index] for index in _chosen_0_30(ask, gpus)])
    return replace(ask, shape=replace(ask.shape, batch_tokens=batch))


def plan(world: World, ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """Where the server puts the model. With no GPUs, or `num_gpu` 0, all of it goes to the CPU."""
    if not gpus or ask.num_gpu == 0:
        return _on_cpu_too(ask, (0,) * len(gpus))
    if ask.version >= (0, 30):
        return _plan_0_30(world, ask, gpus)
    return _plan_0_24(world, ask, gpus)


# --- up to 0.24 -------------------------------------------------------------------------------------------


def graph_bytes(model: ModelFacts, shape: LoadShape) -> int:
    """The compute graph as v0.24 estimates it for the llama.cpp engine; flash attention does not lower it."""
    return offload_rules.graph_bytes(model, shape.context_length * shape.slots, shape.batch_tokens)


def booked_bytes(world: World, model: ModelFacts, shape: LoadShape, layers: Sequence[int]) -> tuple[int, ...]:
    """What a server up to 0.24 books on each GPU for a runner that it has, and takes off what it believes to be free:
    its estimate on the llama.cpp engine, what is true on its own (server/sched.go, `updateFreeSpace`)."""
    if model.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        return true_bytes(world, model, shape, layers)
    unit = layer_bytes(model) + kv_layer_bytes(model, shape)
    graph = graph_bytes(model, shape)
    last = max((index for index, count in enumerate(layers) if count), default=-1)
    surplus = output_bytes(model) - unit if sum(layers) > model.layers else 0
    return tuple(
        count * unit + graph + (surplus if index == last else 0) if count else 0 for index, count in enumerate(layers)
    )


def _plan_0_24(world: World, ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """llm/server.go, v0.24: GPUs with most free memory first, faster ones before; the fewest that hold all layers."""
    if ask.num_gpu > ask.model.layers and not ask.has_others:
        return Plan(_even(ask.model.layers + 1, len(gpus)))
    order = sorted(range(len(gpus)), key=lambda i: (-gpus[i].bandwidth_bytes_per_second, -gpus[i].free_bytes, i))
    total = ask.model.layers + 1
    wanted = total if ask.num_gpu < 0 else min(ask.num_gpu, total)
    for count in range(len(gpus) if ask.spread else 1, len(gpus) + 1):
        units = _capacities(world, ask, [gpus[i] for i in order[:count]])
        if sum(units) >= wanted + (_output_surplus(ask) if wanted == total else 0):
            return _on_cpu_too(ask, _placed(order[:count], _by_room(wanted, units), len(gpus)))
    if ask.has_others:
        return Plan((0,) * len(gpus), must_evict=True)
    units = _capacities(world, ask, [gpus[i] for i in order])
    fitting = min(sum(units), ask.model.layers, wanted)
    return _on_cpu_too(ask, _placed(order, _by_room(fitting, units), len(gpus)))


def _unit_bytes(ask: LoadRequest) -> int:
    """One layer with its part of the cache."""
    return max(1, layer_bytes(ask.model) + kv_layer_bytes(ask.model, ask.shape))


def _output_surplus(ask: LoadRequest) -> int:
    """By how many layers' room the output layer is larger than one layer."""
    return max(0, -(-output_bytes(ask.model) // _unit_bytes(ask)) - 1)


def _capacities(world: World, ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """Units that the server believes each GPU can take."""
    unit = _unit_bytes(ask)
    if ask.model.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        kept = compute_buffer_bytes(ask.model, ask.shape, True) + world.cuda_context_bytes
    else:
        kept = graph_bytes(ask.model, ask.shape) + unit
    kept += KEPT_FREE_BYTES + ask.overhead_bytes
    return [max(0, (gpu.free_bytes - kept) // unit) for gpu in gpus]


# --- from 0.30 --------------------------------------------------------------------------------------------


def predicted_bytes(model: ModelFacts, shape: LoadShape) -> int:
    """The prediction of v0.30 to v0.33: the file and an f16 cache, by width over heads and the fewest KV heads."""
    return offload_rules.predicted_bytes(model, shape.context_length, shape.slots)


def _plan_0_30(world: World, ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> Plan:
    """server/sched.go, v0.33: one GPU within 80 % of its free memory, else all; then llama.cpp's fit."""
    chosen = _chosen_0_30(ask, gpus)
    free = sum(gpus[index].free_bytes for index in chosen)
    if ask.has_others and predicted_bytes(ask.model, ask.shape) > ONE_GPU_SHARE * free:
        return Plan((0,) * len(gpus), must_evict=True)
    total = ask.model.layers + 1
    if ask.num_gpu >= 0:
        wanted = min(ask.num_gpu, total)
        if len(chosen) > 1 and any(ask.tensor_split[: len(gpus)]):
            return Plan(_as_told(ask, wanted, len(gpus)))
        return Plan(_placed(chosen, _by_room(wanted, [gpus[index].free_bytes for index in chosen]), len(gpus)))
    units = _fitting(world, ask, [gpus[i] for i in chosen])
    return _on_cpu_too(ask, _placed(chosen, _by_room(min(total, sum(units)), units), len(gpus)))


def _chosen_0_30(ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """The GPU that was asked for, the one with most room where that is enough by far, or all."""
    if 0 < ask.main_gpu < len(gpus):
        return [ask.main_gpu]
    best = max(range(len(gpus)), key=lambda i: (gpus[i].free_bytes, -i))
    is_enough = predicted_bytes(ask.model, ask.shape) <= ONE_GPU_SHARE * gpus[best].free_bytes
    return [best] if is_enough and not ask.spread else list(range(len(gpus)))


def _fitting_batch(ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> int:
    """The largest up to that of the shape which the prediction leaves room for; without flash attention never a large
    one (`automaticGenerationBatch`, `generationBatchFits`)."""
    shape = ask.shape
    if not shape.flash_attention:
        is_small = any(min(gpu.total_bytes, gpu.free_bytes) <= _SMALL_GPU_BYTES for gpu in gpus)
        return _SMALL_GPU_BATCH if is_small and shape.context_length * shape.slots > 4096 else _LEAST_BATCH
    free = sum(gpu.free_bytes for gpu in gpus)
    predicted = predicted_bytes(ask.model, shape)
    for batch, (share, extra) in _LARGE_BATCHES.items():
        if batch <= shape.batch_tokens and predicted <= share * free and predicted + extra <= ONE_GPU_SHARE * free:
            return batch
    return _LEAST_BATCH


def _as_told(ask: LoadRequest, units: int, gpus: int) -> tuple[int, ...]:
    """So many units, the last ones, in the shares that the server was told, as llama.cpp puts them: a GPU beyond the
    last share gets nothing, however few layers go to the GPUs (`load_tensors`)."""
    split = split_by(units - 1, shares_for(ask.tensor_split, gpus))
    return tuple(count + (gpu == split.output_gpu) for gpu, count in enumerate(split.layers))


def _fitting(world: World, ask: LoadRequest, gpus: Sequence[VisibleGpu]) -> list[int]:
    """Units for which llama.cpp's fit, which measures, finds room on each GPU."""
    unit = _unit_bytes(ask)
    fixed = compute_buffer_bytes(ask.model, ask.shape, True) + world.cuda_context_bytes
    found: list[int] = []
    for index, gpu in enumerate(gpus):
        surplus = 0 if index else world.first_gpu_bytes
        found.append(max(0, (gpu.free_bytes - FIT_TARGET_BYTES - fixed - surplus) // unit))
    return found


# --- shared -----------------------------------------------------------------------------------------------


def _even(units: int, gpus: int) -> tuple[int, ...]:
    """As even as whole units can be, more on the first GPUs."""
    each, rest = divmod(units, gpus)
    return tuple(each + (index < rest) for index in range(gpus))


def _by_room(units: int, room: Sequence[int]) -> list[int]:
    """Shared in proportion to the room of each GPU, never over it; equal rooms share evenly."""
    whole = sum(room)
    if whole <= 0:
        return [0] * len(room)
    shares = [min(space, units * space // whole) for space in room]
    while sum(shares) < units:
        index = min(
            (i for i in range(len(room)) if shares[i] < room[i]),
            key=lambda i: (shares[i] + 1) / room[i],
            default=None,
        )
        if index is None:
            break
        shares[index] += 1
    return shares


def _placed(order: Sequence[int], units: Sequence[int], count: int) -> tuple[int, ...]:
    layers = [0] * count
    for index, amount in zip(order, units, strict=True):
        layers[index] = amount
    return tuple(layers)


def _on_cpu_too(ask: LoadRequest, layers: tuple[int, ...]) -> Plan:
    """The same with a refusal where host memory does not hold what is left for it (llm/server.go, v0.24)."""
    missing = max(0, ask.model.layers + 1 - sum(layers))
    unit = layer_bytes(ask.model) + kv_layer_bytes(ask.model, ask.shape)
    need = missing * unit
    if need <= ask.host_free_bytes:
        return Plan(layers)
    needed, available = human_bytes(need), human_bytes(ask.host_free_bytes)
    error = f"model requires more system memory ({needed}) than is available ({available})"
    return replace(Plan(layers), error=error)


def human_bytes(amount: int) -> str:
    """As Go's `format.HumanBytes2` prints it: `71.5 GiB`."""
    for name, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if amount >= size:
            return f"{amount / size:.1f} {name}"
    return f"{amount} B"


def sizes(world: World, ask: LoadRequest, layers: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Host bytes and true bytes on each GPU of a plan; `/api/ps` shows all as `size`, the latter as `size_vram`."""
    missing = max(0, ask.model.layers + 1 - sum(layers))
    unit = layer_bytes(ask.model) + kv_layer_bytes(ask.model, ask.shape)
    return missing * unit, true_bytes(world, ask.model, ask.shape, layers)
