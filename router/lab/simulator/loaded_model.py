"""One model loaded in a simulated server: what it holds, what its server believes that it holds, and who uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator import server_placement
from router.lab.simulator.batching import Batcher, BatchFacts, OnFinished
from router.lab.simulator.load_shape import RequestedShape, kept_tokens, shape_for
from router.lab.simulator.machine import Machine, ResidencySpan
from router.lab.simulator.requests import Request
from router.lab.simulator.timeline import Timer
from router.lab.simulator.weight_transfer import Transfer
from router.lab.simulator.world import LoadShape, kv_layer_bytes, layer_bytes, speed, true_bytes

_FIVE_MINUTES = 300.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How one server is run. The defaults are the two lines of a good admin: flash attention and a q8_0 cache, two
    slots of 8,192 tokens."""

    version: tuple[int, ...] = (0, 24, 0)
    slots: int = 2
    context_length: int = 8192
    kv_cache_type: str = "q8_0"
    flash_attention: bool = True
    spread: bool = False
    tensor_split: tuple[float, ...] = ()
    keep_alive_seconds: float = _FIVE_MINUTES
    max_loaded: int = 0
    """0: three models a GPU."""
    host_memory_bytes: int = 120 * 1024**3

    @property
    def is_0_30(self) -> bool:
        return self.version >= (0, 30)

    def model_limit(self, gpus: int) -> int:
        return self.max_loaded or 3 * max(1, gpus)


def shape_of(model: ModelFacts, config: ServerConfig) -> LoadShape:
    """How this server loads this model where memory is no matter."""
    asked = RequestedShape(
        config.version, config.context_length, config.slots, config.kv_cache_type, config.flash_attention
    )
    return shape_for(model, asked)


class Phase(Enum):
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class ModelRunner:
    """A runner. `users` counts requests that hold it back from leaving, waiting ones too."""

    machine: Machine
    server: str
    model: ModelFacts
    uuids: tuple[GpuUuid, ...]
    bytes_by_gpu: dict[GpuUuid, int]
    booked_bytes: dict[GpuUuid, int]
    host_bytes: int
    batcher: Batcher
    keep_alive_seconds: float
    owner: int
    phase: Phase = Phase.LOADING
    users: int = 0
    expiry: Timer | None = None
    transfer: Transfer | None = None
    span: ResidencySpan | None = None
    waiting_for_load: list[tuple[Request, OnFinished]] = field(default_factory=list[tuple[Request, OnFinished]])
    on_delisted: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    on_gone: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """Somewhat later: its server goes on only when it has seen the memory free."""

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
        """The runner for this layout, without its memory yet."""
        sizes = true_bytes(machine.world, model, shape, layers)
        used = tuple(uuid for uuid, count in zip(gpus, layers, strict=True) if count > 0)
        facts = [machine.ledger.by_uuid[uuid].facts for uuid in gpus]
        share = machine.active_shares.get(model.name, 1.0)
        pace = speed(machine.world, model, facts, layers, active_share=share, batch=shape.batch_tokens)
        missing = max(0, model.layers + 1 - sum(layers))
        return cls(
            machine=machine,
            server=server,
            model=model,
            uuids=used,
            bytes_by_gpu={uuid: size for uuid, size in zip(gpus, sizes, strict=True) if size},
            booked_bytes=dict(
                zip(gpus, server_placement.booked_bytes(machine.world, model, shape, layers), strict=True)
            ),
            host_bytes=missing * (layer_bytes(model) + kv_layer_bytes(model, shape)),
            batcher=Batcher(
                machine.timeline,
                BatchFacts(pace, shape.slots, kept_tokens(model, shape, config.version)),
                lambda works: _mark(machine, used, works),
                lambda: machine.ledger.slowdown_factor(used),
            ),
            keep_alive_seconds=config.keep_alive_seconds,
            owner=machine.new_allocation_id(),
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
        """Takes its memory. Raises OutOfMemoryError, having taken none."""
        self.machine.ledger.allocate(self.owner, self.bytes_by_gpu)

    def begin(self, done: Callable[[], None]) -> None:
        """Reads its weights; its memory is taken."""
        stats = self.machine.stats
        stats.loads += 1
        stats.loaded_bytes += self.model.weights_bytes
        stats.spilled_loads += bool(self.uuids) and self.host_bytes > 0
        self.span = ResidencySpan(
            self.server, self.model.name, self.bytes_by_gpu, self.host_bytes, self.machine.timeline.now
        )
        stats.residency_spans.append(self.span)
        self.transfer = self.machine.transfers.start(self.blob, self.model.weights_bytes, bool(self.uuids), done)

    def ready(self) -> None:
        """Its weights are read: who came early is served."""
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
        """True where the request was here; it no longer counts as a user."""
        for entry in self.waiting_for_load:
            if entry[0] is request:
                self.waiting_for_load.remove(entry)
                return True
        return self.batcher.cancel(request)

    def drop(self) -> list[tuple[Request, OnFinished]]:
        """The runner dies: what it had. Their ends do not count as users leaving."""
        if self.transfer is not None:
            self.machine.transfers.abort(self.transfer)
        lost = self.batcher.stop() + self.waiting_for_load
        self.waiting_for_load = []
        return lost

    def end(self) -> None:
        """Its memory is free again."""
        self.phase = Phase.GONE
        self.machine.ledger.release(self.owner)
        if self.expiry is not None:
            self.expiry.cancel()
        if self.span is not None:
            self.span.ended_at = self.machine.timeline.now


def _mark(machine: Machine, uuids: tuple[GpuUuid, ...], works: bool) -> None:
    if works:
        machine.ledger.work_began(uuids, machine.timeline.now)
    else:
        machine.ledger.work_ended(uuids, machine.timeline.now)
