"""One simulated Ollama server: its scheduling loop, loads and evictions, as in version 0.24 or 0.33.

The loop places one request at a time; nothing else is placed while it reads memory, evicts, waits for a busy model or
loads weights. Requests for a loaded model bypass the loop and wait for a slot. The server's memory estimates come from
`router.lab.simulator.server_placement`, the true sizes from `router.lab.simulator.true_footprint`. Every baseline uses
it, including the simulated router.
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
from router.lab.simulator.true_footprint import LoadShape

RUNNER_LOST = "runner lost"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Result of a load; `error` is empty on success."""

    size_bytes: int = 0
    size_vram_bytes: int = 0
    error: str = ""


@dataclass(slots=True, eq=False)
class LoadJob:
    """A queued request or explicit load whose model is not loaded."""

    model: ModelFacts
    num_gpu: int
    request: Request | None
    served: OnFinished | None
    loaded: Callable[[LoadResult], None] | None
    is_cancelled: bool = False
    is_retried: bool = False


class SimServer:
    """One server process over `gpus`, in the server's device order; no GPUs: a CPU server."""

    def __init__(self, machine: Machine, name: str, gpus: tuple[GpuUuid, ...], config: ServerConfig) -> None:
        self.name = name
        self.gpus = gpus
        self.config = config
        self._machine = machine
        self._loaded: dict[BlobDigest, ModelRunner] = {}
        self._pending: deque[LoadJob] = deque()
        self._current: LoadJob | None = None
        self._afterwards: list[Callable[[], None]] | None = None
        """Callbacks to run after the current pass over the queue, last first; None outside a pass."""
        self._first_free: dict[GpuUuid, int] = {}
        self._generation = 0

    # --- client interface ----------------------------------------------------------------------------------

    @property
    def loaded(self) -> tuple[ModelRunner, ...]:
        """The models that `/api/ps` lists."""
        return tuple(self._loaded.values())

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = self.name
        runner = self._loaded.get(request.model.blob)
        if runner is not None and runner.phase in (Phase.LOADING, Phase.READY):
            runner.serve(request, lambda r, error: self._request_ended(runner, r, error, done))
            return
        self._enqueue(LoadJob(request.model, -1, request, done, None))

    def load(self, model: ModelFacts, num_gpu: int, done: Callable[[LoadResult], None]) -> LoadJob:
        """Loads a model without a prompt; `num_gpu` -1: the server decides. See `abort_load`."""
        job = LoadJob(model, num_gpu, None, None, done)
        runner = self._loaded.get(model.blob)
        if runner is not None and runner.phase is Phase.READY:
            done(LoadResult(runner.size_bytes, runner.size_vram_bytes))
        else:
            self._enqueue(job)
        return job

    def abort_load(self, job: LoadJob) -> None:
        """The connection of an explicit load was dropped: ends it, as the server does for a client that leaves."""
        if self._current is job:
            self._abandon(job)
        else:
            job.is_cancelled = True

    def unload(self, blob: BlobDigest, done: Callable[[], None]) -> None:
        """Like `keep_alive` 0: unloads the model once idle; `done` is called when it is no longer listed."""
        runner = self._loaded.get(blob)
        if runner is None:
            done()
            return
        runner.on_delisted.append(done)
        self._expire_now(runner)

    def cancel(self, request: Request) -> None:
        """The client disconnected: aborts the load made for this request, or removes it from the queue."""
        for job in self._pending:
            if job.request is request:
                job.is_cancelled = True
                return
        if self._current is not None and self._current.request is request:
            self._abandon(self._current)
            return
        for runner in list(self._loaded.values()):
            if runner.cancel(request):
                self._release_user(runner)

    def kill(self) -> None:
        """Crashes the server with all its runners: frees their memory at once and fails every request."""
        jobs = [*([self._current] if self._current else []), *self._pending]
        for job in jobs:
            job.is_cancelled = True
        self._pending.clear()
        self._current = None
        self._generation += 1
        unfinished = [entry for runner in self._loaded.values() for entry in runner.drop()]
        for runner in list(self._loaded.values()):
            self._remove(runner)
        for request, done in unfinished:
            done(request, RUNNER_LOST)
        for job in jobs:
            self._end_job(job, RUNNER_LOST)

    # --- scheduling loop -----------------------------------------------------------------------------------

    def _enqueue(self, job: LoadJob) -> None:
        self._pending.append(job)
        self._place_next()

    def _place_next(self) -> None:
        """Places queued jobs until one takes time. Callbacks of jobs that end at once run after the pass."""
        if self._afterwards is not None:
            return
        afterwards: list[Callable[[], None]] = []
        self._afterwards = afterwards
        while self._current is None and self._pending:
            job = self._pending.popleft()
            if not job.is_cancelled:
                self._current = job
                self._try_place(job)
        self._afterwards = None
        while afterwards:
            afterwards.pop()()

    def _done_placing(self, afterwards: Callable[[], None] | None = None) -> None:
        """Continues with the next job; `afterwards` is called after the pass over the queue."""
        self._current = None
        if self._afterwards is None:
            self._place_next()
            if afterwards is not None:
                afterwards()
        elif afterwards is not None:
            self._afterwards.append(afterwards)

    def _abandon(self, job: LoadJob) -> None:
        """Drops the job being placed. Other requests waiting for its load are queued again."""
        job.is_cancelled = True
        runner = self._loaded.get(job.model.blob)
        if runner is not None and runner.phase is Phase.LOADING:
            other_runners = runner.drop()
            self._remove(runner)
            self._pending.extend(LoadJob(request.model, -1, request, done, None) for request, done in other_runners)
            self._done_placing()

    def _after(self, seconds: float, step: Callable[[], None]) -> None:
        """Calls `step` after a delay, unless the server crashes first."""
        generation = self._generation
        self._machine.timeline.after(seconds, lambda: step() if generation == self._generation else None)

    def _try_place(self, job: LoadJob) -> None:
        if job.is_cancelled:
            self._done_placing()
            return
        runner = self._loaded.get(job.model.blob)
        if runner is not None and runner.phase is Phase.READY:
            self._hand_over(job, runner)
        elif runner is not None:
            runner.on_gone.append(lambda: self._try_place(job))
        elif len(self._loaded) >= self.config.model_limit(len(self.gpus)):
            self._make_room(job)
        else:
            self._after(self._machine.world.memory_read_seconds if not self.config.is_0_30
                        else self._machine.world.memory_read_seconds_0_30, lambda: self._place(job))  # fmt: skip

    def _place(self, job: LoadJob) -> None:
        if job.is_cancelled:
            self._done_placing()
            return
        gpus = self._visible_gpus()
        load_request = server_placement.with_fitting_batch(self._load_request(job), gpus)
        plan = server_placement.plan(load_request, gpus)
        if plan.error is not None:
            self._fail(job, plan.error)
        elif plan.must_evict:
            self._make_room(job)
        else:
            self._start(job, plan.layers, load_request.shape)

    def _make_room(self, job: LoadJob) -> None:
        """Evicts the idle model with the shortest keep-alive, ties by blob; if none is idle, waits for the first."""
        runners = sorted(self._loaded.values(), key=lambda one: (one.keep_alive_seconds, one.model.blob))
        victim = next((one for one in runners if one.users == 0), runners[0] if runners else None)
        if victim is None:
            self._fail(job, "out of memory: nothing is left to evict")
            return
        victim.on_gone.append(lambda: self._try_place(job))
        self._expire_now(victim)

    def _start(self, job: LoadJob, layers: tuple[int, ...], shape: LoadShape) -> None:
        runner = ModelRunner.plan(self._machine, self.name, job.model, self.config, self.gpus, layers, shape)
        for uuid in runner.uuids:
            if not any(uuid in other.uuids for other in self._loaded.values()):
                self._first_free[uuid] = self._machine.ledger.free_bytes(uuid)
        try:
            runner.allocate()
        except OutOfMemoryError as error:
            self._out_of_memory(job, str(error))
            return
        self._loaded[job.model.blob] = runner
        runner.begin(lambda: self._ready(job, runner))

    def _out_of_memory(self, job: LoadJob, message: str) -> None:
        """0.24 fails; from 0.30 all other models are evicted, busy ones once idle, and the load is retried once."""
        other_runners = list(self._loaded.values())
        if not self.config.is_0_30 or job.is_retried or not other_runners:
            self._machine.stats.failed_loads += 1
            self._fail(job, f"out of memory: {message}")
            return
        job.is_retried = True
        still_loaded = set(other_runners)

        def unloaded(one: ModelRunner) -> None:
            still_loaded.discard(one)
            if not still_loaded:
                self._try_place(job)

        for one in other_runners:
            one.on_gone.append(partial(unloaded, one))
            self._expire_now(one)

    def _ready(self, job: LoadJob, runner: ModelRunner) -> None:
        runner.ready()
        self._hand_over(job, runner)

    def _hand_over(self, job: LoadJob, runner: ModelRunner) -> None:
        request, served = job.request, job.served
        if request is not None and served is not None:
            runner.serve(request, lambda r, error: self._request_ended(runner, r, error, served))
        elif runner.users == 0:
            self._start_expiry(runner)
        loaded = job.loaded
        if loaded is None:
            self._done_placing()
        else:
            self._done_placing(lambda: loaded(LoadResult(runner.size_bytes, runner.size_vram_bytes)))

    def _fail(self, job: LoadJob, error: str) -> None:
        self._done_placing(lambda: self._end_job(job, error))

    def _end_job(self, job: LoadJob, error: str) -> None:
        if job.request is not None and job.served is not None:
            job.served(job.request, error)
        elif job.loaded is not None:
            job.loaded(LoadResult(error=error))

    # --- memory estimates ----------------------------------------------------------------------------------

    def _load_request(self, job: LoadJob) -> server_placement.LoadRequest:
        return server_placement.LoadRequest(
            model=job.model,
            shape=self._machine.shape_of_load(job.model, shape_of(job.model, self.config), self.gpus),
            version=self.config.version,
            num_gpu=job.num_gpu,
            spread=self.config.spread,
            tensor_split=self.config.tensor_split,
            has_others=bool(self._loaded),
            host_free_bytes=self.config.host_memory_bytes,
        )

    def _visible_gpus(self) -> list[server_placement.VisibleGpu]:
        return [self._visible_gpu(uuid) for uuid in self.gpus]

    def _visible_gpu(self, uuid: GpuUuid) -> server_placement.VisibleGpu:
        """The free memory the server assumes. 0.24: the smaller of the driver's value and its own bookkeeping. 0.30: a
        GPU with a runner is not read again."""
        gpu = self._machine.ledger.by_uuid[uuid]
        free = self._machine.ledger.free_bytes(uuid)
        runners_here = [one for one in self._loaded.values() if uuid in one.uuids]
        if runners_here and self.config.is_0_30:
            free = self._first_free[uuid] - sum(one.bytes_by_gpu[uuid] for one in runners_here)
        elif runners_here:
            free = min(free, gpu.usable_bytes - sum(one.booked_bytes[uuid] for one in runners_here))
        return server_placement.VisibleGpu(gpu.usable_bytes, max(0, free), gpu.facts.bandwidth_bytes_per_second)

    # --- unloading -----------------------------------------------------------------------------------------

    def _request_ended(self, runner: ModelRunner, request: Request, error: str, done: OnFinished) -> None:
        self._release_user(runner)
        done(request, error)

    def _release_user(self, runner: ModelRunner) -> None:
        runner.users -= 1
        if runner.users == 0 and runner.phase is Phase.READY:
            if runner.keep_alive_seconds == 0:
                self._unload(runner)
            else:
                self._start_expiry(runner)

    def _start_expiry(self, runner: ModelRunner) -> None:
        keep_alive_seconds = runner.keep_alive_seconds
        if keep_alive_seconds != float("inf"):
            runner.expiry = self._machine.timeline.after(keep_alive_seconds, lambda: self._keep_alive_expired(runner))

    def _keep_alive_expired(self, runner: ModelRunner) -> None:
        if runner.users == 0 and runner.phase is Phase.READY:
            self._unload(runner)

    def _expire_now(self, runner: ModelRunner) -> None:
        """Unloads the model once idle; later requests for it still delay that."""
        runner.keep_alive_seconds = 0.0
        if runner.users == 0 and runner.phase is Phase.READY:
            self._unload(runner)

    def _unload(self, runner: ModelRunner) -> None:
        runner.phase = Phase.UNLOADING
        unload_seconds = self._machine.unload_seconds(self.config.version, runner.allocation_id)
        self._after(self._machine.world.kill_seconds, lambda: self._delist(runner))
        self._after(unload_seconds, lambda: _call_all(runner.on_gone))

    def _delist(self, runner: ModelRunner) -> None:
        """Frees the runner's memory; requests no longer find it."""
        runner.end()
        if self._loaded.get(runner.model.blob) is runner:
            del self._loaded[runner.model.blob]
        _call_all(runner.on_delisted)

    def _remove(self, runner: ModelRunner) -> None:
        """Removes a crashed runner at once."""
        self._delist(runner)
        _call_all(runner.on_gone)


def _call_all(calls: list[Callable[[], None]]) -> None:
    pending_calls = calls.copy()
    calls.clear()
    for call in pending_calls:
        call()
