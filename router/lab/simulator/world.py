"""Cost model of the simulated hardware: how long things take.

Shared by the simulator and the emulated server, so that a trace takes the same time on both. Every constant that a
measurement could correct is in one table, `WORLD`. What a loaded model takes is in
`router.lab.simulator.true_footprint`, and what a *server* assumes in `router.lab.simulator.server_placement`. Pure
functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class World:
    """Constants of the cost model; the names carry the units."""

    load_fixed_seconds: float = 1.2
    load_fixed_cpu_seconds: float = 0.25
    """Runner start-up. Public logs: 1.0 to 1.5 s on a GPU (2 to 3 s for 1.6 to 2.4 GB in all); measured on a CPU with
    0.4 MB and with 100 MB of weights: 0.28 s."""
    load_fitting_seconds_0_30: float = 0.5
    """llama.cpp's fit, from 0.30: 0.3 to 4 s in public logs."""
    warm_bytes_per_second: float = 4.9e9
    cold_bytes_per_second: float = 1.0e9
    """Public logs: 4.2 to 6.1 GB/s from a warm page cache; 0.3 to 2 from a disk, which a rig may set."""
    host_bytes_per_second: float = 12e9
    """Total rate of concurrent loads from the page cache: half of what two channels of DDR4-3200 copy (51 GB/s read and
    written). Assumed. Loads from disk share `cold_bytes_per_second`."""
    memory_read_seconds: float = 0.45
    memory_read_seconds_0_30: float = 0.2
    """Time a server with GPUs spends reading free memory before each attempt (server/sched.go, v0.24 and v0.33)."""
    unload_seconds: float = 0.8
    unload_seconds_0_30: float = 0.65
    """Killing a runner and waiting until its memory is freed; 1.25 s (0.33: 0.85 s) with the reading above."""
    unload_tail_seconds: float = 5.2
    unload_tail_share: float = 0.2
    """Up to 0.24, in this share of unloads, the memory seems not to come back ("didn't recover within timeout"), and
    the server waits 5.2 to 5.4 s. The share is assumed."""
    kill_seconds: float = 0.25
    """Time until a killed runner is no longer listed and its memory is freed. Assumed; the rest of `unload_seconds` is
    the server's polling, every 250 ms."""

    discovery_seconds: float = 0.5
    discovery_cpu_seconds: float = 0.05
    """From the start of a server until it has reported its devices, which may take up to 30 s."""
    pull_bytes_per_second: float = 117e6
    """A download over 1 Gbit/s, minus framing overhead."""

    decode_efficiency: float = 0.823
    decode_seconds_per_layer: float = 73e-6
    """A step reads all weights at this share of the GPU's bandwidth and adds a fixed time per layer. Both are fitted to
    two measurements on 3090s (936 GB/s): 120 tokens/s with an 8B and 16.6 with a 70B, both Q4_K_M."""
    decode_efficiency_ada: float = 0.9
    decode_seconds_per_layer_ada: float = 15e-6
    """The same from compute capability 8.9 on (40-series): 193 tokens/s with an 8B Q4_0 on a 4090."""
    decode_experts_share: float = 0.714
    """Further factor for a mixture of experts: 21.1 tokens/s with Mixtral 8x22B (Q4_K_M, 85.6 GB) on four 3090s."""
    stream_share: float = 0.08
    """Each further stream in a batch lengthens a step by this share."""
    prefill_efficiency: float = 1.82
    """Prompt evaluation in floating point operations (two per parameter and token) per FP32 operation of the GPU's data
    sheet: 4,030 tokens/s with an 8B on a 3090 (35.6 TFLOPS). Above 1 because tensor cores are used."""
    prefill_split_share: float = 0.82
    """Factor when layers are split over several GPUs: 375 tokens/s with a 70B on two 3090s."""

    cpu_thread_bytes_per_second: float = 2.06e9
    cpu_thread_prefill_flops: float = 4.1e9
    cpu_threads: int = 16
    cpu_bytes_per_second: float = 40e9
    """Measured with 103 MB of f16 weights and one thread: 50 ms per token, 25 ms per prompt token; in total no faster
    than two channels of DDR4."""
    offload_bytes_per_second: float = 12e9
    """On a server with GPUs a prompt batch is evaluated on a GPU even for layers on the CPU: their weights are streamed
    over PCIe each time, at half the rate of PCIe 4.0 x16 because they are not pinned. Assumed."""
    cpu_fraction_work: float = 0.1
    """Share of a step that an emulated CPU runner really computes, so that its CPU time increases."""


WORLD = World()
_INSTANT_SECONDS = 0.05
_INSTANT_BYTES_PER_SECOND = 1e12


def with_instant_swaps(world: World) -> World:
    """The same hardware, on which an unload and a load take 0.05 s each, whatever their size."""
    return replace(
        world,
        load_fixed_seconds=_INSTANT_SECONDS,
        load_fixed_cpu_seconds=_INSTANT_SECONDS,
        load_fitting_seconds_0_30=0.0,
        warm_bytes_per_second=_INSTANT_BYTES_PER_SECOND,
        cold_bytes_per_second=_INSTANT_BYTES_PER_SECOND,
        host_bytes_per_second=_INSTANT_BYTES_PER_SECOND,
        memory_read_seconds=0.0,
        memory_read_seconds_0_30=0.0,
        unload_seconds=_INSTANT_SECONDS,
        unload_seconds_0_30=_INSTANT_SECONDS,
        unload_tail_share=0.0,
        kill_seconds=_INSTANT_SECONDS,
    )


_FINE_TABLE_BITS = 7.5
"""Bits per element: above Q6_K, the finest table type in common four-bit files."""
_FOUR_BIT_WITH_FINE_TABLES = frozenset(("gptoss", "gpt-oss", "gemma4"))
"""MXFP4 experts beside 16-bit tables; tables for each layer beside the first."""


@dataclass(frozen=True, slots=True)
class GpuModel:
    """The figures that determine a GPU's speed."""

    bandwidth_bytes_per_second: float
    fp32_teraflops: float
    compute_capability: tuple[int, int] = (8, 6)

    @property
    def is_ada_or_later(self) -> bool:
        return self.compute_capability >= (8, 9)


def input_bytes(model: ModelFacts) -> int:
    """Token embedding table, kept in host memory: as reported, else 4.5 bits per element."""
    default_bytes = model.vocabulary_size * model.embedding_length * 9 // 16
    return min(default_bytes if model.input_bytes is None else model.input_bytes, model.weights_bytes // 2)


def load_fixed_seconds(world: World, version: tuple[int, ...], *, on_gpus: bool = True) -> float:
    """Time of a load besides reading the weights, on a server of that version."""
    if not on_gpus:
        return world.load_fixed_cpu_seconds
    return world.load_fixed_seconds + (world.load_fitting_seconds_0_30 if version >= (0, 30) else 0.0)


def unload_seconds(world: World, version: tuple[int, ...], number: float = 1.0) -> float:
    """Time from an unload until its server goes on. `number`: a random one from 0 to 1; small ones give the tail."""
    if version >= (0, 30):
        return world.unload_seconds_0_30
    return world.unload_tail_seconds if number < world.unload_tail_share else world.unload_seconds


def load_seconds(
    world: World, weights_bytes: int, warm: bool, on_gpus: bool = True, version: tuple[int, ...] = (0, 24, 0)
) -> float:
    """Time from a runner's start until it can serve a request."""
    fixed = load_fixed_seconds(world, version, on_gpus=on_gpus)
    return fixed + weights_bytes / (world.warm_bytes_per_second if warm else world.cold_bytes_per_second)


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of a loaded model, in emulated seconds."""

    step_seconds: float
    """One token of one stream."""
    stream_share: float
    """Share of a step that each further stream adds."""
    prefill_seconds_per_token: float
    batch_tokens: int
    is_cpu: bool

    def step(self, streams: int) -> float:
        """Duration of one token for each of `streams` streams."""
        return self.step_seconds * (1 + self.stream_share * max(0, streams - 1))


def speed(
    world: World,
    model: ModelFacts,
    gpus: Sequence[GpuModel],
    layers: Sequence[int],
    threads: int = 0,
    active_share: float = 1.0,
    batch: int = 512,
) -> Speed:
    """Speed of a model on these GPUs.

    `layers` as for `true_gpu_bytes`; `threads` 0: all; `active_share`: share of the weights that one token reads (below
    1 for mixtures of experts); `batch`: prompt tokens evaluated at once.
    """
    total = model.layers + 1
    bytes_per_step = max(1, model.weights_bytes - input_bytes(model) - model.projector_bytes) * active_share
    parameters = _parameters(model) * active_share
    placed = [(gpu, count) for gpu, count in zip(gpus, layers, strict=True) if count > 0]
    on_cpu = max(0, total - sum(count for _, count in placed)) / total
    experts = world.decode_experts_share if active_share < 1 else 1.0
    step = prefill = 0.0
    split = world.prefill_split_share if len(placed) > 1 else 1.0
    for gpu, count in placed:
        share = count / total
        step += _gpu_step_seconds(world, gpu, share * model.layers, share * bytes_per_step / experts)
        prefill += 2 * parameters * share / (gpu.fp32_teraflops * 1e12 * world.prefill_efficiency * split)
    used = threads or world.cpu_threads
    cpu_rate = min(world.cpu_bytes_per_second, used * world.cpu_thread_bytes_per_second)
    step += bytes_per_step * on_cpu / cpu_rate
    if gpus and on_cpu:
        gpu = (placed[0][0] if placed else gpus[0]).fp32_teraflops * 1e12
        prefill += 2 * parameters * on_cpu / (gpu * world.prefill_efficiency)
        prefill += bytes_per_step * on_cpu / (world.offload_bytes_per_second * batch)
    else:
        prefill += 2 * parameters * on_cpu / (used * world.cpu_thread_prefill_flops)
    return Speed(step, world.stream_share, prefill, batch, is_cpu=not placed)


def _gpu_step_seconds(world: World, gpu: GpuModel, layers: float, weights_bytes: float) -> float:
    if gpu.is_ada_or_later:
        fixed, efficiency = world.decode_seconds_per_layer_ada, world.decode_efficiency_ada
    else:
        fixed, efficiency = world.decode_seconds_per_layer, world.decode_efficiency
    return fixed * layers + weights_bytes / (gpu.bandwidth_bytes_per_second * efficiency)


def _parameters(model: ModelFacts) -> float:
    """Parameter count from the file size: 4.85 bits each as in Q4_K_M, or the bits per element of a finer table."""
    table = model.vocabulary_size * model.embedding_length
    output_bytes = max(0, (model.output_bytes or 0) - model.projector_bytes)
    reported_bytes = min((size for size in (model.input_bytes, output_bytes) if size), default=0)
    bits = reported_bytes * 8 / table if table else 0.0
    if model.architecture in _FOUR_BIT_WITH_FINE_TABLES or not _FINE_TABLE_BITS < bits <= 33.0:
        bits = 4.85
    return max(1.0, (model.weights_bytes - model.projector_bytes) * 8 / bits)
