"""A model runner of a simulated server: the memory it holds, the memory its server books for it, and its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator import server_placement
from router.lab.simulator.batching import Batcher, BatchParameters, OnFinished
from router.lab.simulator.load_shape import RequestedShape, kept_tokens, shape_for
from router.lab.simulator.machine import Machine, ResidencySpan
from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timer
from router.lab.simulator.true_footprint import LoadShape, true_gpu_bytes, true_host_bytes
from router.lab.simulator.weight_transfer import Transfer
from router.lab.simulator.world import Speed, load_fixed_seconds, speed

_DEFAULT_KEEP_ALIVE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of one server. The defaults are those of a well-tuned stock server: flash attention, a q8_0 cache and
    two slots of 8,192 tokens."""

    version: tuple[int, ...] = (0, 24, 0)
    slots: int = 2
    context_length: int = 8192
    kv_cache_type: str = "q8_0"
    flash_attention: bool = True
    spread: bool = False
    tensor_split: tuple[float, ...] = ()
    keep_alive_seconds: float = _DEFAULT_KEEP_ALIVE_SECONDS
    max_loaded: int = 0
    """`OLLAMA_MAX_LOADED_MODELS`; 0: three per GPU."""
    host_memory_bytes: int = 120 * 1024**3

    @property
    def is_0_30(self) -> bool:
        return self.version >= (0, 30)

    def model_limit(self, gpus: int) -> int:
        return self.max_loaded or 3 * max(1, gpus)


def shape_of(model: ModelFacts, config: ServerConfig) -> LoadShape:
    """The shape in which this server loads this model when memory is not short."""
    requested = RequestedShape(
        config.version, config.context_length, config.slots, config.kv_cache_type, config.flash_attention
    )
    return shape_for(model, requested)


class Phase(Enum):
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class ModelRunner:
    """One runner process. `users` counts the running and waiting requests that block its unloading."""

    machine: Machine
    server: str
    model: ModelFacts
    uuids: tuple[GpuUuid, ...]
    bytes_by_gpu: dict[GpuUuid, int]
    booked_bytes: dict[GpuUuid, int]
    host_bytes: int
    batcher: Batcher
    keep_alive_seconds: float
    allocation_id: int
    version: tuple[int, ...]
    """Of its server."""
    speed: Speed
    phase: Phase = Phase.LOADING
    users: int = 0
    expiry: Timer | None = None
    transfer: Transfer | None = None
    span: ResidencySpan | None = None
    waiting_for_load: list[tuple[Request, OnFinished]] = field(default_factory=list[tuple[Request, OnFinished]])
    on_delisted: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    on_gone: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """Called after `on_delisted`: the server proceeds only once it has seen the memory freed."""

    @classmethod
    def plan(
        cls,
        machine: Machine,
        server: str,
        model: ModelFacts,
        config: ServerConfig,
        gpus: tuple[GpuUuid, ...],
        layers: tuple[int, ...],
        shape: LoadShape,
    ) -> ModelRunner:
        """Creates a runner for this layout; its memory is not allocated yet."""
        bytes_per_gpu = true_gpu_bytes(model, shape, layers)
        used_gpus = tuple(uuid for uuid, count in zip(gpus, layers, strict=True) if count > 0)
        facts = [machine.ledger.by_uuid[uuid].facts for uuid in gpus]
        share = machine.active_shares.get(model.name, 1.0)
        runner_speed = speed(machine.world, model, facts, layers, active_share=share, batch=shape.batch_tokens)
        return cls(
            machine=machine,
            server=server,
            model=model,
            uuids=used_gpus,
            bytes_by_gpu={uuid: size for uuid, size in zip(gpus, bytes_per_gpu, strict=True) if size},
            booked_bytes=dict(zip(gpus, server_placement.booked_bytes(model, shape, layers), strict=True)),
            host_bytes=true_host_bytes(model, shape, layers),
            batcher=Batcher(
                machine.timeline,
                BatchParameters(runner_speed, shape.slots, kept_tokens(model, shape, config.version)),
                lambda is_working: _record_work(machine, used_gpus, is_working),
                lambda: machine.ledger.slowdown_factor(used_gpus),
            ),
            keep_alive_seconds=config.keep_alive_seconds,
            allocation_id=machine.new_allocation_id(),
            version=config.version,
            speed=runner_speed,
        )

    @property
    def blob(self) -> BlobDigest:
        return self.model.blob

    @property
    def size_vram_bytes(self) -> int:
        return sum(self.bytes_by_gpu.values())

    @property
    def size_bytes(self) -> int:
        return self.size_vram_bytes + self.host_bytes

    def allocate(self) -> None:
        """Allocates its memory on all GPUs or on none. Raises OutOfMemoryError."""
        self.machine.ledger.allocate(self.allocation_id, self.bytes_by_gpu)

    def begin(self, done: Callable[[], None]) -> None:
        """Starts the weight transfer; call after `allocate`."""
        stats = self.machine.stats
        stats.loads += 1
        stats.loaded_bytes += self.model.weights_bytes
        stats.spilled_loads += bool(self.uuids) and self.host_bytes > 0
        self.span = ResidencySpan(
            self.server, self.model.name, self.bytes_by_gpu, self.host_bytes, self.machine.timeline.now
        )
        stats.residency_spans.append(self.span)
        fixed_seconds = load_fixed_seconds(self.machine.world, self.version, on_gpus=bool(self.uuids))
        self.transfer = self.machine.transfers.start(self.blob, self.model.weights_bytes, fixed_seconds, done)

    def ready(self) -> None:
        """The weights are loaded: submits the requests that waited for them."""
        self.phase = Phase.READY
        self.transfer = None
        if self.span is not None:
            self.span.ready_at = self.machine.timeline.now
        waiting_for_load, self.waiting_for_load = self.waiting_for_load, []
        for request, done in waiting_for_load:
            self.batcher.submit(request, done)

    def serve(self, request: Request, done: OnFinished) -> None:
        self.users += 1
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        if self.phase is Phase.LOADING:
            self.waiting_for_load.append((request, done))
        else:
            self.batcher.submit(request, done)

    def cancel(self, request: Request) -> bool:
        """Removes a request; the caller adjusts `users`. Returns False if the request is unknown."""
        for entry in self.waiting_for_load:
            if entry[0] is request:
                self.waiting_for_load.remove(entry)
                return True
        return self.batcher.cancel(request)

    def drop(self) -> list[tuple[Request, OnFinished]]:
        """Ends the runner process. Returns its unfinished requests; `users` is unchanged."""
        if self.transfer is not None:
            self.machine.transfers.abort(self.transfer)
        unfinished = self.batcher.stop() + self.waiting_for_load
        self.waiting_for_load = []
        return unfinished

    def end(self) -> None:
        """Frees its memory."""
        self.phase = Phase.GONE
        self.machine.ledger.release(self.allocation_id)
        if self.expiry is not None:
            self.expiry.cancel()
        if self.span is not None:
            self.span.ended_at = self.machine.timeline.now


def _record_work(machine: Machine, uuids: tuple[GpuUuid, ...], is_working: bool) -> None:
    if is_working:
        machine.ledger.work_began(uuids, machine.timeline.now)
    else:
        machine.ledger.work_ended(uuids, machine.timeline.now)
