"""One simulated Ollama server: its loop, its loads and evictions, by the behaviour of 0.24 or of 0.33.

The loop places one request at a time, and nothing else is placed while it reads memory, evicts, waits for a busy model
or reads weights. Requests for a loaded model pass by the loop and wait for a slot. What it *believes* of sizes comes
from `router.lab.simulator.server_placement`, what is true from `router.lab.simulator.world`. Used by every contestant,
the router's too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator import server_placement
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.gpus import OutOfMemoryError
from router.lab.simulator.loaded_model import ModelRunner, Phase, ServerConfig, shape_of
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.world import LoadShape

LOST = "runner lost"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How a load ended; `error` empty where it went well."""

    size_bytes: int = 0
    size_vram_bytes: int = 0
    error: str = ""


@dataclass(slots=True, eq=False)
class _Job:
    """Something that needs its model loaded: a request, or a load by itself."""

    model: ModelFacts
    num_gpu: int
    request: Request | None
    served: OnFinished | None
    loaded: Callable[[LoadResult], None] | None
    gone: bool = False
    retried: bool = False


class SimServer:
    """`gpus` in the order in which the server sees them; empty for one on the CPU."""

    def __init__(self, machine: Machine, name: str, gpus: tuple[GpuUuid, ...], config: ServerConfig) -> None:
        self.name = name
        self.gpus = gpus
        self.config = config
        self._machine = machine
        self._loaded: dict[BlobDigest, ModelRunner] = {}
        self._pending: deque[_Job] = deque()
        self._placing: _Job | None = None
        self._afterwards: list[Callable[[], None]] | None = None
        """While the queue is gone through: what is to be called then, the last first."""
        self._first_free: dict[GpuUuid, int] = {}
        self._life = 0

    # --- for clients ---------------------------------------------------------------------------------------

    @property
    def loaded(self) -> tuple[ModelRunner, ...]:
        """What `/api/ps` lists."""
        return tuple(self._loaded.values())

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = self.name
        found = self._loaded.get(request.model.blob)
        if found is not None and found.phase in (Phase.LOADING, Phase.READY):
            found.serve(request, lambda r, error: self._served(found, r, error, done))
            return
        self._queue(_Job(request.model, -1, request, done, None))

    def load(self, model: ModelFacts, num_gpu: int, done: Callable[[LoadResult], None]) -> None:
        """A request without a prompt; `num_gpu` -1 leaves it to the server."""
        found = self._loaded.get(model.blob)
        if found is not None and found.phase is Phase.READY:
            done(LoadResult(found.size_bytes, found.size_vram_bytes))
            return
        self._queue(_Job(model, num_gpu, None, None, done))

    def unload(self, blob: BlobDigest, done: Callable[[], None]) -> None:
        """`keep_alive` 0: gone when idle; `done` when it is no longer listed."""
        found = self._loaded.get(blob)
        if found is None:
            done()
            return
        found.on_delisted.append(done)
        self._expire(found)

    def cancel(self, request: Request) -> None:
        """The client left. During a load this aborts the load; where it waits for one, its place is lost."""
        for job in self._pending:
            if job.request is request:
                job.gone = True
                return
        if self._placing is not None and self._placing.request is request:
            self._abandon(self._placing)
            return
        for found in list(self._loaded.values()):
            if found.cancel(request):
                self._user_left(found)

    def kill(self) -> None:
        """The server dies with all its runners: memory is free at once, and every request ends."""
        jobs = [*([self._placing] if self._placing else []), *self._pending]
        for job in jobs:
            job.gone = True
        self._pending.clear()
        self._placing = None
        self._life += 1
        lost = [entry for found in self._loaded.values() for entry in found.drop()]
        for found in list(self._loaded.values()):
            self._gone(found)
        for request, done in lost:
            done(request, LOST)
        for job in jobs:
            self._end_job(job, LOST)

    # --- the loop ------------------------------------------------------------------------------------------

    def _queue(self, job: _Job) -> None:
        self._pending.append(job)
        self._next()

    def _next(self) -> None:
        """Places what waits, until something takes time. Those placed at once end here and not inside each other."""
        if self._afterwards is not None:
            return
        afterwards: list[Callable[[], None]] = []
        self._afterwards = afterwards
        while self._placing is None and self._pending:
            job = self._pending.popleft()
            if not job.gone:
                self._placing = job
                self._try(job)
        self._afterwards = None
        while afterwards:
            afterwards.pop()()

    def _done_placing(self, afterwards: Callable[[], None] | None = None) -> None:
        """The next is placed, and `afterwards` called once that and all after it have been looked at."""
        self._placing = None
        if self._afterwards is None:
            self._next()
            if afterwards is not None:
                afterwards()
        elif afterwards is not None:
            self._afterwards.append(afterwards)

    def _abandon(self, job: _Job) -> None:
        """The client of the request that is being placed left. Others who came for the same load queue for another."""
        job.gone = True
        found = self._loaded.get(job.model.blob)
        if found is not None and found.phase is Phase.LOADING:
            others = found.drop()
            self._gone(found)
            self._pending.extend(_Job(request.model, -1, request, done, None) for request, done in others)
            self._done_placing()

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        """The same after some time, unless the server died in between."""
        life = self._life
        self._machine.timeline.after(seconds, lambda: step() if life == self._life else None)

    def _try(self, job: _Job) -> None:
        if job.gone:
            self._done_placing()
            return
        found = self._loaded.get(job.model.blob)
        if found is not None and found.phase is Phase.READY:
            self._hand_over(job, found)
        elif found is not None:
            found.on_gone.append(lambda: self._try(job))
        elif len(self._loaded) >= self.config.model_limit(len(self.gpus)):
            self._make_room(job)
        else:
            self._later(self._machine.world.memory_read_seconds if not self.config.is_0_30
                        else self._machine.world.memory_read_seconds_0_30, lambda: self._place(job))  # fmt: skip

    def _place(self, job: _Job) -> None:
        if job.gone:
            self._done_placing()
            return
        rooms = self._rooms()
        ask = server_placement.with_fitting_batch(self._ask(job), rooms)
        plan = server_placement.plan(self._machine.world, ask, rooms)
        if plan.error is not None:
            self._fail(job, plan.error)
        elif plan.must_evict:
            self._make_room(job)
        else:
            self._start(job, plan.layers, ask.shape)

    def _make_room(self, job: _Job) -> None:
        """Unloads the idle model with the shortest keep-alive, ties by blob; none idle: waits for the first of all."""
        runners = sorted(self._loaded.values(), key=lambda one: (one.keep_alive_seconds, one.model.blob))
        victim = next((one for one in runners if one.users == 0), runners[0] if runners else None)
        if victim is None:
            self._fail(job, "out of memory: nothing is left to evict")
            return
        victim.on_gone.append(lambda: self._try(job))
        self._expire(victim)

    def _start(self, job: _Job, layers: tuple[int, ...], shape: LoadShape) -> None:
        found = ModelRunner.plan(self._machine, self.name, job.model, self.config, self.gpus, layers, shape)
        for uuid in found.uuids:
            if not any(uuid in other.uuids for other in self._loaded.values()):
                self._first_free[uuid] = self._machine.ledger.free_bytes(uuid)
        try:
            found.allocate()
        except OutOfMemoryError as error:
            self._out_of_memory(job, str(error))
            return
        self._loaded[job.model.blob] = found
        found.begin(lambda: self._ready(job, found))

    def _out_of_memory(self, job: _Job, message: str) -> None:
        """0.24 fails; from 0.30 all others are evicted, busy ones once idle, and the load is tried once more."""
        others = list(self._loaded.values())
        if not self.config.is_0_30 or job.retried or not others:
            self._machine.stats.failed_loads += 1
            self._fail(job, f"out of memory: {message}")
            return
        job.retried = True
        staying = set(others)

        def gone(one: ModelRunner) -> None:
            staying.discard(one)
            if not staying:
                self._try(job)

        for one in others:
            one.on_gone.append(partial(gone, one))
            self._expire(one)

    def _ready(self, job: _Job, found: ModelRunner) -> None:
        found.ready()
        self._hand_over(job, found)

    def _hand_over(self, job: _Job, found: ModelRunner) -> None:
        request, served = job.request, job.served
        if request is not None and served is not None:
            found.serve(request, lambda r, error: self._served(found, r, error, served))
        elif found.users == 0:
            self._start_expiry(found)
        loaded = job.loaded
        if loaded is None:
            self._done_placing()
        else:
            self._done_placing(lambda: loaded(LoadResult(found.size_bytes, found.size_vram_bytes)))

    def _fail(self, job: _Job, error: str) -> None:
        self._done_placing(lambda: self._end_job(job, error))

    def _end_job(self, job: _Job, error: str) -> None:
        if job.request is not None and job.served is not None:
            job.served(job.request, error)
        elif job.loaded is not None:
            job.loaded(LoadResult(error=error))

    # --- what it believes ----------------------------------------------------------------------------------

    def _ask(self, job: _Job) -> server_placement.LoadRequest:
        return server_placement.LoadRequest(
            model=job.model,
            shape=shape_of(job.model, self.config),
            version=self.config.version,
            num_gpu=job.num_gpu,
            spread=self.config.spread,
            tensor_split=self.config.tensor_split,
            has_others=bool(self._loaded),
            host_free_bytes=self.config.host_memory_bytes,
        )

    def _rooms(self) -> list[server_placement.VisibleGpu]:
        return [self._room(uuid) for uuid in self.gpus]

    def _room(self, uuid: GpuUuid) -> server_placement.VisibleGpu:
        """0.24: the smaller of the driver's word and its own books. 0.30: a GPU with a runner is not read again."""
        gpu = self._machine.ledger.by_uuid[uuid]
        free = self._machine.ledger.free_bytes(uuid)
        own = [one for one in self._loaded.values() if uuid in one.uuids]
        if own and self.config.is_0_30:
            free = self._first_free[uuid] - sum(one.bytes_by_gpu[uuid] for one in own)
        elif own:
            free = min(free, gpu.usable_bytes - sum(one.booked_bytes[uuid] for one in own))
        return server_placement.VisibleGpu(gpu.usable_bytes, max(0, free), gpu.facts.bandwidth_bytes_per_second)

    # --- leaving -------------------------------------------------------------------------------------------

    def _served(self, found: ModelRunner, request: Request, error: str, done: OnFinished) -> None:
        self._user_left(found)
        done(request, error)

    def _user_left(self, found: ModelRunner) -> None:
        found.users -= 1
        if found.users == 0 and found.phase is Phase.READY:
            if found.keep_alive_seconds == 0:
                self._unload(found)
            else:
                self._start_expiry(found)

    def _start_expiry(self, found: ModelRunner) -> None:
        keep = found.keep_alive_seconds
        if keep != float("inf"):
            found.expiry = self._machine.timeline.after(keep, lambda: self._expired(found))

    def _expired(self, found: ModelRunner) -> None:
        if found.users == 0 and found.phase is Phase.READY:
            self._unload(found)

    def _expire(self, found: ModelRunner) -> None:
        """Gone as soon as nobody uses it; requests that still come for it hold it back."""
        found.keep_alive_seconds = 0.0
        if found.users == 0 and found.phase is Phase.READY:
            self._unload(found)

    def _unload(self, found: ModelRunner) -> None:
        found.phase = Phase.UNLOADING
        world = self._machine.world
        whole = world.unload_seconds_0_30 if self.config.is_0_30 else world.unload_seconds
        self._later(world.kill_seconds, lambda: self._delist(found))
        self._later(whole, lambda: _call_all(found.on_gone))

    def _delist(self, found: ModelRunner) -> None:
        """Its memory is free, and a request for it finds no runner."""
        found.end()
        if self._loaded.get(found.model.blob) is found:
            del self._loaded[found.model.blob]
        _call_all(found.on_delisted)

    def _gone(self, found: ModelRunner) -> None:
        """The same at once, by death."""
        self._delist(found)
        _call_all(found.on_gone)


def _call_all(calls: list[Callable[[], None]]) -> None:
    waiting = calls.copy()
    calls.clear()
    for call in waiting:
        call()
