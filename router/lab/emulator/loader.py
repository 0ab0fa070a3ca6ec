"""How the EMULATED server loads a model: read free memory, plan as its version does, start a runner, wait.

If the GPUs have less memory than planned, it does what the real versions do: Ollama's own engine retries with a
smaller plan, the llama.cpp engine fails, and from 0.30 all other models are evicted once. Limitations: the context is
never lowered automatically, and a broken weights file loads as a small model instead of failing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts
from router.engines.ollama.blob_store import StoredModel
from router.engines.ollama.ggml_types import GGML_BLOCKS
from router.engines.ollama.gguf_facts import facts_of
from router.lab.emulator import load_output
from router.lab.emulator.config import Config, log
from router.lab.emulator.faults import Behaviour
from router.lab.emulator.http_server import ClientDisconnectedError, Request
from router.lab.emulator.loaded_model import LoadedModel
from router.lab.emulator.memory import Memory
from router.lab.emulator.model_facts import active_share
from router.lab.emulator.options import Options
from router.lab.emulator.runner_process import RunnerProcess
from router.lab.emulator.store import Header, Store
from router.lab.simulator import world as worlds
from router.lab.simulator.load_shape import RequestedShape, kept_tokens, shape_for
from router.lab.simulator.server_placement import (
    OLLAMA_ENGINE_ARCHITECTURES,
    LoadRequest,
    Plan,
    VisibleGpu,
    booked_bytes,
    default_context,
    plan,
    sizes,
    with_fitting_batch,
)
from router.lab.simulator.true_footprint import LoadShape, cache_bytes_of, chance, cuda_context_bytes, deviation
from router.lab.simulator.world import GpuModel, World

LOADS_FILE = "loads.jsonl"
"""File in the emulator's directory with one JSON line per finished load; for comparing servers."""
_RETRIES = 10
"""Retries of Ollama's own engine, each with 10 % less memory."""


class LoadError(Exception):
    """The model cannot be loaded; the message is the server's."""


class MustEvictError(Exception):
    """Another model must be evicted first."""

    def __init__(self, all_others: bool = False) -> None:
        super().__init__()
        self.all_others = all_others


@dataclass(frozen=True, slots=True)
class LoaderContext:
    """Dependencies of a loader."""

    config: Config
    world: World
    store: Store
    memory: Memory
    environment: Mapping[str, str]
    """Environment of runner processes."""
    behaviour: Callable[[str], Behaviour]
    """Returns the injected faults of a model, by its shortest name."""


class Loader:
    """Starts runners. The scheduler calls `start`, registers the result, then calls `wait_until_loaded`."""

    def __init__(self, context: LoaderContext) -> None:
        self._context = context
        self._config = context.config
        self._world = context.world
        self._next_port = 40_000
        self._load_counts: dict[str, int] = {}
        self._unloads = 0

    def seconds(self, emulated: float) -> float:
        """Converts emulated to real seconds."""
        return emulated / self._config.speed

    def default_context(self) -> int:
        """Context length if neither the request nor the Modelfile sets one."""
        total_bytes = sum(gpu.memory_total_bytes for gpu in self._config.gpus)
        return self._config.context_length or default_context(
            total_bytes, self._config.version, self._config.overhead_bytes if self._config.gpus else 0
        )

    async def start(
        self, stored: StoredModel, options: Options, others: list[LoadedModel], session_seconds: float
    ) -> LoadedModel:
        """Plans the layout and starts an empty runner.

        Raises:
            LoadError: the server refuses immediately.
            MustEvictError: no room next to the other models.
        """
        if self._config.gpus:
            world, is_0_30 = self._world, self._config.is_0_30
            read_seconds = world.memory_read_seconds_0_30 if is_0_30 else world.memory_read_seconds
            await asyncio.sleep(self.seconds(read_seconds))
        header = self._context.store.header(stored.weights.digest)
        facts = facts_of(stored, header)
        rooms = self._context.memory.rooms(others)
        ask = with_fitting_batch(self._placement_request(facts, options, others), rooms)
        chosen_plan = self._plan_or_raise(ask, rooms)
        blob = self._context.store.blob(stored.weights.digest)
        self._next_port += 1
        process = await RunnerProcess.start(blob, self._next_port, self._config.emulator_dir, self._context.environment)
        if self._config.is_0_30:
            load_output.log_start(blob, self._next_port, ask)
        else:
            log("INFO", "starting runner", model=stored.name.shortest, pid=process.pid, layers=chosen_plan.layers)
        return self._loaded(stored, header, facts, options, ask, chosen_plan, process, session_seconds)

    def _plan_or_raise(self, ask: LoadRequest, rooms: Sequence[VisibleGpu]) -> Plan:
        chosen_plan = plan(ask, rooms)
        if chosen_plan.must_evict:
            raise MustEvictError
        if chosen_plan.error is not None:
            raise LoadError(_host_allocation_error(ask) if self._config.is_0_30 else chosen_plan.error)
        return chosen_plan

    def _placement_request(self, facts: ModelFacts, options: Options, others: list[LoadedModel]) -> LoadRequest:
        config = self._config
        requested_shape = RequestedShape(
            version=config.version,
            context_length=options.runner.num_ctx,
            slots=config.num_parallel,
            kv_cache_type=self._supported_kv_type(),
            flash_attention=config.flash_attention,
            batch_tokens=options.runner.num_batch if options.is_batch_given else None,
        )
        shape = self._shape_of_load(facts, shape_for(facts, requested_shape))
        if shape.kv_cache_type != config.kv_cache_type:
            log("WARN", "quantized kv cache requested but flash attention is not enabled", type=config.kv_cache_type)
        return LoadRequest(
            model=facts,
            shape=shape,
            is_batch_given=options.is_batch_given,
            version=config.version,
            num_gpu=options.runner.num_gpu,
            main_gpu=options.runner.main_gpu or 0,
            spread=config.spread,
            tensor_split=config.tensor_split,
            overhead_bytes=config.overhead_bytes,
            has_others=bool(others),
            host_free_bytes=self._context.memory.host_free_bytes(others),
        )

    def _shape_of_load(self, facts: ModelFacts, shape: LoadShape) -> LoadShape:
        """With the deviation of this load and the CUDA context of these GPUs."""
        config = self._config
        capability = max((gpu.compute_capability for gpu in config.gpus), default=(0, 0))
        shape = replace(shape, cuda_context_bytes=cuda_context_bytes(capability))
        if not config.deviation:
            return shape
        self._load_counts[facts.blob] = count = self._load_counts.get(facts.blob, 0) + 1
        return replace(shape, size_ratio=deviation(config.seed, facts, count, config.deviation))

    def _supported_kv_type(self) -> str:
        kv_cache_type = self._config.kv_cache_type
        return kv_cache_type if kv_cache_type.upper() in GGML_BLOCKS else "f16"

    def _loaded(
        self,
        stored: StoredModel,
        header: Header,
        facts: ModelFacts,
        options: Options,
        ask: LoadRequest,
        chosen_plan: Plan,
        process: RunnerProcess,
        session_seconds: float,
    ) -> LoadedModel:
        host, on_gpus = sizes(ask, chosen_plan.layers)
        gpus = self._by_gpu(on_gpus)
        runner, config = options.runner, self._config
        shown_bytes = load_output.buffer_bytes(ask, chosen_plan.layers) if config.is_0_30 else sum(gpus.values())
        if config.is_0_30 and runner.use_mmap is None:
            use_mmap = None if config.gpus and runner.num_gpu != 0 else False
            runner = replace(runner, use_mmap=use_mmap, is_mmap_automatic=True)
        if not options.is_batch_given:
            runner = replace(runner, num_batch=ask.shape.batch_tokens)
        return LoadedModel(
            stored=stored,
            blob=self._context.store.blob(stored.weights.digest),
            header=header,
            facts=facts,
            options=runner,
            context_length=ask.shape.context_length,
            process=process,
            load_request=ask,
            size_bytes=0 if self._is_uncounted(options) else host + shown_bytes,
            size_vram_bytes=shown_bytes,
            layers=chosen_plan.layers,
            bytes_by_gpu=gpus,
            believed_by_gpu=self._by_gpu(booked_bytes(facts, ask.shape, chosen_plan.layers)),
            host_bytes=host,
            session_seconds=session_seconds,
            slot_count=ask.shape.slots,
            kept_tokens=kept_tokens(facts, ask.shape, self._config.version),
        )

    def _is_uncounted(self, options: Options) -> bool:
        """Whether `/api/ps` says 0 bytes: from 0.30 all layers count as offloaded on a machine that has no GPU."""
        return self._config.is_0_30 and not self._config.gpus and options.runner.num_gpu != 0

    def _by_gpu(self, sizes_in_order: Sequence[int]) -> dict[str, int]:
        return {gpu.uuid: size for gpu, size in zip(self._config.gpus, sizes_in_order, strict=True) if size > 0}

    # --- the load itself ---

    async def wait_until_loaded(
        self, loaded: LoadedModel, options: Options, all_loaded: list[LoadedModel], request: Request
    ) -> None:
        """Waits until the model is loaded.

        Raises:
            LoadError, MustEvictError: the load failed.
            ClientDisconnectedError: the requesting client disconnected, which aborts the load.
        """
        others = [other for other in all_loaded if other is not loaded]
        started_at = time.monotonic()
        name = loaded.stored.name.shortest
        is_cached = self._context.memory.is_cached(loaded.key, loaded.facts.weights_bytes)
        total_seconds = worlds.load_seconds(
            self._world, loaded.facts.weights_bytes, is_cached, bool(loaded.bytes_by_gpu), self._config.version
        )
        faults = self._context.behaviour(name)
        loaded.process.behave(faults.slow, faults.hang, faults.die)
        for attempt in range(_RETRIES + 1):
            remaining_seconds = max(0.0, self.seconds(total_seconds) - (time.monotonic() - started_at))
            error_text = await self._try_load(loaded, options, remaining_seconds, request, faults.oom)
            self._record_load(loaded, error_text)
            if error_text is None:
                loaded.create_slots()
                self._log_loaded(loaded, time.monotonic() - started_at)
                return
            log("ERROR", "Load failed" if self._config.is_0_30 else "load failed", model=name, error=error_text)
            self._after_failure(loaded, options, others, error_text, attempt)
        raise LoadError("memory layout cannot be allocated")

    def _log_loaded(self, loaded: LoadedModel, seconds: float) -> None:
        if self._config.is_0_30:
            load_output.print_buffers(loaded.load_request, loaded.layers)
            load_output.log_end(seconds)
        else:
            log("INFO", "llama runner started", model=loaded.stored.name.shortest, seconds=round(seconds, 2))

    def _record_load(self, loaded: LoadedModel, error_text: str | None) -> None:
        if self._config.emulator_dir is None:
            return
        line = {
            "model": loaded.stored.name.shortest,
            "weights_bytes": loaded.facts.weights_bytes,
            "bytes_by_gpu": dict(loaded.bytes_by_gpu),
            "host_bytes": loaded.host_bytes,
            "is_whole": sum(loaded.layers) > loaded.facts.layers,
            "problem": error_text,
        }
        with (self._config.emulator_dir / LOADS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    async def _try_load(
        self, loaded: LoadedModel, options: Options, seconds: float, request: Request, is_oom_injected: bool
    ) -> str | None:
        """Returns None once loaded, else the error."""
        if is_oom_injected and loaded.bytes_by_gpu:
            return "CUDA error: out of memory"
        load = loaded.process.load(loaded.bytes_by_gpu, seconds, self._token_rate(loaded, options))
        async with asyncio.TaskGroup() as tasks:
            load_task, disconnect_task = tasks.create_task(load), tasks.create_task(request.disconnected.wait())
            await asyncio.wait((load_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
            ended = load_task.done()
            load_task.cancel()
            disconnect_task.cancel()
        if not ended:
            raise ClientDisconnectedError
        return load_task.result()

    def _after_failure(
        self, loaded: LoadedModel, options: Options, others: list[LoadedModel], error_text: str, attempt: int
    ) -> None:
        """Changes the plan for a retry, or raises."""
        if "out of memory" not in error_text or not loaded.bytes_by_gpu:
            raise LoadError(f"llama runner process has terminated: {error_text}")
        if self._config.is_0_30 and others:
            raise MustEvictError(all_others=True)
        is_ollama_engine = loaded.facts.architecture in OLLAMA_ENGINE_ARCHITECTURES
        if self._config.is_0_30 or not is_ollama_engine or options.runner.num_gpu >= 0:
            raise LoadError("llama runner process has terminated: cudaMalloc failed: out of memory")
        share = 1.0 - 0.1 * (attempt + 1)
        rooms = [
            VisibleGpu(room.total_bytes, int(room.free_bytes * share), room.bandwidth_bytes_per_second)
            for room in self._context.memory.rooms(others)
        ]
        ask = self._placement_request(loaded.facts, options, others)
        loaded.layers = self._plan_or_raise(ask, rooms).layers
        host, on_gpus = sizes(ask, loaded.layers)
        loaded.bytes_by_gpu = loaded.believed_by_gpu = self._by_gpu(
            on_gpus
        )  # Ollama's own engine measures real allocations
        loaded.host_bytes, loaded.size_bytes, loaded.size_vram_bytes = host, host + sum(on_gpus), sum(on_gpus)

    def _token_rate(self, loaded: LoadedModel, options: Options) -> dict[str, float | int]:
        gpus = [
            GpuModel(gpu.bandwidth_bytes_per_second, gpu.fp32_teraflops, gpu.compute_capability)
            for gpu in self._config.gpus
        ]
        share, batch = active_share(loaded.header), max(1, loaded.options.num_batch)
        threads = options.runner.num_thread
        speed = worlds.speed(self._world, loaded.facts, gpus, loaded.layers, threads, share, batch)
        return {
            "step_seconds": self.seconds(speed.step_seconds),
            "stream_share": speed.stream_share,
            "prefill_seconds_per_token": self.seconds(speed.prefill_seconds_per_token),
            "batch_tokens": speed.batch_tokens,
            "work_share": self._world.cpu_fraction_work if speed.is_cpu else 0.0,
        }

    async def wait_for_memory_release(self, loaded: LoadedModel) -> None:
        """Waits, as a real server does, until the memory of a killed runner shows as free."""
        if loaded.bytes_by_gpu:
            self._unloads += 1
            config = self._config
            number = chance(config.seed, f"unload {config.port} {self._unloads}") if config.deviation else 1.0
            await asyncio.sleep(self.seconds(worlds.unload_seconds(self._world, config.version, number)))


def _host_allocation_error(request: LoadRequest) -> str:
    """What llama-server says of a KV cache that host memory cannot hold; it is started whatever the load needs."""
    size = cache_bytes_of(request.model, request.shape)
    return (
        "llama-server process has terminated: exit status 1: "
        f"ggml_aligned_malloc: insufficient memory (attempted to allocate {size / 1024**2:.2f} MB)\n"
        f"ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size {size}\n"
        f"alloc_tensor_range: failed to allocate CPU buffer of size {size}\n"
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"
    )
