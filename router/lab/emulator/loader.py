"""How the EMULATED server loads a model: reads free memory, plans as its version does, starts a runner, waits.

Where the GPUs turn out to have less room than the plan believed, it does what the real versions do: Ollama's own
engine tries again with less, llama.cpp's fails, from 0.30 all other models are evicted once. Kinder than the truth:
the context is never lowered by itself, and a broken weights file loads as a small model instead of failing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from router.domain.model import ModelFacts
from router.engines.ollama.ggml_types import GGML_BLOCKS
from router.lab.emulator.config import Config, log
from router.lab.emulator.faults import Behaviour
from router.lab.emulator.http_server import ClientLeftError, Request
from router.lab.emulator.loaded_model import Loaded
from router.lab.emulator.memory import Memory
from router.lab.emulator.model_facts import active_share, facts_of
from router.lab.emulator.options import Options
from router.lab.emulator.runner_process import RunnerProcess
from router.lab.emulator.store import Header, Store, Stored
from router.lab.simulator import world as worlds
from router.lab.simulator.load_shape import RequestedShape, kept_tokens, shape_for
from router.lab.simulator.server_placement import (
    OLLAMA_ENGINE_ARCHITECTURES,
    Ask,
    Plan,
    Room,
    believed_bytes,
    default_context,
    plan,
    settled,
    sizes,
)
from router.lab.simulator.world import GpuModel, World

LOADS_FILE = "loads.jsonl"
"""In the rig's directory: a line for each load that ended, for whoever compares servers."""
_RETRIES = 10
"""How often Ollama's own engine tries again, each time with 10 % less."""


class LoadError(Exception):
    """The model cannot be loaded; the text is the server's."""


class MustEvictError(Exception):
    """Something else must leave first."""

    def __init__(self, all_others: bool = False) -> None:
        super().__init__()
        self.all_others = all_others


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a loader stands on."""

    config: Config
    world: World
    store: Store
    memory: Memory
    environment: Mapping[str, str]
    """For runner children."""
    behaviour: Callable[[str], Behaviour]
    """What goes wrong with a model, by its shortest name."""


class Loader:
    """Starts runners. The scheduler calls `start`, lists what came, then calls `finish`."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._config = around.config
        self._world = around.world
        self._next_port = 40_000

    def seconds(self, emulated: float) -> float:
        """Real seconds for emulated ones."""
        return emulated / self._config.speed

    def default_context(self) -> int:
        """Tokens where neither request nor Modelfile names a context."""
        total = sum(gpu.memory_total_bytes for gpu in self._config.gpus)
        return self._config.context_length or default_context(
            total, self._config.version, self._config.overhead_bytes if self._config.gpus else 0
        )

    async def start(self, stored: Stored, options: Options, others: list[Loaded], session_seconds: float) -> Loaded:
        """Plans, and starts a runner that has nothing in it yet.

        Raises:
            LoadError: the server refuses at once.
            MustEvictError: no room beside the others.
        """
        if self._config.gpus:
            is_new = self._config.is_0_30
            read = self._world.memory_read_seconds_0_30 if is_new else self._world.memory_read_seconds
            await asyncio.sleep(self.seconds(read))
        header = self._around.store.header(stored.weights.digest)
        facts = facts_of(stored, header)
        rooms = self._around.memory.rooms(others)
        ask = settled(self._ask(facts, options, others), rooms)
        chosen = self._planned(ask, rooms)
        blob = self._around.store.blob(stored.weights.digest)
        self._next_port += 1
        process = await RunnerProcess.start(blob, self._next_port, self._config.rig_dir, self._around.environment)
        log("INFO", "starting runner", model=stored.name.shortest, pid=process.pid, layers=chosen.layers)
        return self._loaded(stored, header, facts, options, ask, chosen, process, session_seconds)

    def _planned(self, ask: Ask, rooms: Sequence[Room]) -> Plan:
        chosen = plan(self._world, ask, rooms)
        if chosen.must_evict:
            raise MustEvictError
        if chosen.error is not None:
            raise LoadError(chosen.error)
        return chosen

    def _ask(self, facts: ModelFacts, options: Options, others: list[Loaded]) -> Ask:
        config = self._config
        asked = RequestedShape(
            version=config.version,
            context_length=options.runner.num_ctx,
            slots=config.num_parallel,
            kv_cache_type=self._known_type(),
            flash_attention=config.flash_attention,
            batch_tokens=options.runner.num_batch if options.is_batch_given else None,
        )
        shape = shape_for(facts, asked)
        if shape.kv_cache_type != config.kv_cache_type:
            log("WARN", "quantized kv cache requested but flash attention is not enabled", type=config.kv_cache_type)
        return Ask(
            model=facts,
            shape=shape,
            is_batch_given=options.is_batch_given,
            version=config.version,
            num_gpu=options.runner.num_gpu,
            main_gpu=options.runner.main_gpu,
            spread=config.spread,
            tensor_split=config.tensor_split,
            overhead_bytes=config.overhead_bytes,
            has_others=bool(others),
            host_free_bytes=self._around.memory.host_free_bytes(others),
        )

    def _known_type(self) -> str:
        kind = self._config.kv_cache_type
        return kind if kind.upper() in GGML_BLOCKS else "f16"

    def _loaded(
        self,
        stored: Stored,
        header: Header,
        facts: ModelFacts,
        options: Options,
        ask: Ask,
        chosen: Plan,
        process: RunnerProcess,
        session_seconds: float,
    ) -> Loaded:
        host, on_gpus = sizes(self._world, ask, chosen.layers)
        gpus = self._by_gpu(on_gpus)
        runner = options.runner
        if not options.is_batch_given:
            runner = replace(runner, num_batch=ask.shape.batch_tokens)
        return Loaded(
            stored=stored,
            blob=self._around.store.blob(stored.weights.digest),
            header=header,
            facts=facts,
            options=runner,
            context_length=ask.shape.context_length,
            process=process,
            size_bytes=host + sum(gpus.values()),
            layers=chosen.layers,
            bytes_by_gpu=gpus,
            believed_by_gpu=self._by_gpu(believed_bytes(self._world, facts, ask.shape, chosen.layers)),
            host_bytes=host,
            session_seconds=session_seconds,
            slot_count=ask.shape.slots,
            kept_tokens=kept_tokens(facts, ask.shape, self._config.version),
        )

    def _by_gpu(self, sizes_in_order: Sequence[int]) -> dict[str, int]:
        return {gpu.uuid: size for gpu, size in zip(self._config.gpus, sizes_in_order, strict=True) if size > 0}

    # --- the load itself ---

    async def finish(self, loaded: Loaded, options: Options, all_loaded: list[Loaded], request: Request) -> None:
        """Waits until the model can serve.

        Raises:
            LoadError, MustEvictError: it does not come to that.
            ClientLeftError: the client that wanted it has left, which aborts the load.
        """
        others = [one for one in all_loaded if one is not loaded]
        began = time.monotonic()
        name = loaded.stored.name.shortest
        warm = self._around.memory.is_cached(loaded.key, loaded.facts.weights_bytes)
        total = worlds.load_seconds(self._world, loaded.facts.weights_bytes, warm, bool(loaded.bytes_by_gpu))
        faulty = self._around.behaviour(name)
        loaded.process.behave(faulty.slow, faulty.hang, faulty.die)
        for attempt in range(_RETRIES + 1):
            left = max(0.0, self.seconds(total) - (time.monotonic() - began))
            problem = await self._try(loaded, options, left, request, faulty.oom)
            self._record(loaded, problem)
            if problem is None:
                loaded.begin()
                log("INFO", "llama runner started", model=name, seconds=round(time.monotonic() - began, 2))
                return
            log("ERROR", "load failed", model=name, attempt=attempt, error=problem)
            self._after_failure(loaded, options, others, problem, attempt)
        raise LoadError("memory layout cannot be allocated")

    def _record(self, loaded: Loaded, problem: str | None) -> None:
        if self._config.rig_dir is None:
            return
        line = {
            "model": loaded.stored.name.shortest,
            "weights_bytes": loaded.facts.weights_bytes,
            "bytes_by_gpu": dict(loaded.bytes_by_gpu),
            "host_bytes": loaded.host_bytes,
            "is_whole": sum(loaded.layers) > loaded.facts.layers,
            "problem": problem,
        }
        with (self._config.rig_dir / LOADS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    async def _try(
        self, loaded: Loaded, options: Options, seconds: float, request: Request, is_taken: bool
    ) -> str | None:
        """None once loaded, else why not."""
        if is_taken and loaded.bytes_by_gpu:
            return "CUDA error: out of memory"
        load = loaded.process.load(loaded.bytes_by_gpu, seconds, self._pace(loaded, options))
        async with asyncio.TaskGroup() as tasks:
            loading, leaving = tasks.create_task(load), tasks.create_task(request.left.wait())
            await asyncio.wait((loading, leaving), return_when=asyncio.FIRST_COMPLETED)
            ended = loading.done()
            loading.cancel()
            leaving.cancel()
        if not ended:
            raise ClientLeftError
        return loading.result()

    def _after_failure(
        self, loaded: Loaded, options: Options, others: list[Loaded], problem: str, attempt: int
    ) -> None:
        """Changes the plan for another try, or raises."""
        if "out of memory" not in problem or not loaded.bytes_by_gpu:
            raise LoadError(f"llama runner process has terminated: {problem}")
        if self._config.is_0_30 and others:
            raise MustEvictError(all_others=True)
        is_own = loaded.facts.architecture in OLLAMA_ENGINE_ARCHITECTURES
        if self._config.is_0_30 or not is_own or options.runner.num_gpu >= 0:
            raise LoadError("llama runner process has terminated: cudaMalloc failed: out of memory")
        share = 1.0 - 0.1 * (attempt + 1)
        rooms = [
            Room(room.total_bytes, int(room.free_bytes * share), room.bandwidth_bytes_per_second)
            for room in self._around.memory.rooms(others)
        ]
        ask = self._ask(loaded.facts, options, others)
        loaded.layers = self._planned(ask, rooms).layers
        host, on_gpus = sizes(self._world, ask, loaded.layers)
        loaded.bytes_by_gpu = loaded.believed_by_gpu = self._by_gpu(on_gpus)  # its own engine measures
        loaded.host_bytes, loaded.size_bytes = host, host + sum(on_gpus)

    def _pace(self, loaded: Loaded, options: Options) -> dict[str, float | int]:
        gpus = [GpuModel(gpu.bandwidth_bytes_per_second, gpu.fp32_teraflops) for gpu in self._config.gpus]
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

    async def recovered(self, loaded: Loaded) -> None:
        """Waits as a real server does until the memory of a killed runner is seen to be free."""
        if loaded.bytes_by_gpu:
            is_new = self._config.is_0_30
            seconds = self._world.unload_seconds_0_30 if is_new else self._world.unload_seconds
            await asyncio.sleep(self.seconds(seconds))
