"""A saturated in-memory machine for benchmarking the scheduler.

It has GPUs, instances, loads and requests under a virtual clock. Every action of the dispatcher takes effect after a
realistic delay. A fixed number of tickets always waits: each granted one is replaced. Loaded models use exactly the
estimated memory. Deterministic for a seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from router.domain.actions import Action, Grant, Load, ReadGpus, Reject, StartInstance, StopInstance, Unload
from router.domain.events import (
    Arrived,
    Event,
    GpusRead,
    InstanceChanged,
    LoadedModel,
    LoadFinished,
    Released,
    ResidencyRead,
    Ticked,
    UnloadFinished,
)
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import Policy, SchedulerConstants
from router.domain.request import Ticket, TicketId
from router.domain.residency import ResidencyKey, ResidencyState
from router.domain.snapshot import Snapshot
from router.engines.ollama.rules import KIND, OllamaRules
from router.scheduler.dispatcher import Dispatcher

GPU_BYTES = 24 * 1024**3
VERSION = "0.24.0"
_LOAD_BYTES_PER_SECOND = 3e9
_POLL_SECONDS = 1.0
_CLIENTS = 12

Post = Callable[[Dispatcher, Event, float], list[Action]]
"""Passes the event to the dispatcher; the caller can time it."""


def make_models(kinds: list[ModelFacts], count: int) -> list[ModelFacts]:
    """Creates `count` models with the sizes of `kinds` and distinct weights."""
    return [
        replace(
            kinds[number % len(kinds)], name=f"model{number}", digest=f"{number:064x}", blob=BlobDigest(f"b{number}")
        )
        for number in range(count)
    ]


_RULES = OllamaRules()


class BusyMachine:
    """One instance per GPU and one over all GPUs; models are requested by Zipf's law."""

    def __init__(self, gpus: int, models: list[ModelFacts], waiting: int, seed: int, post: Post) -> None:
        self.policy = Policy(
            instances_on_demand=True,
            on_demand_like=_spec("", ()),
            queue_limit=max(512, 2 * waiting),
            constants=SchedulerConstants(unseen_margin_ratio=0.02),
        )
        self.dispatcher = Dispatcher(self.policy, {KIND: _RULES})
        self.now = 0.0
        self._post_to = post
        self._rng = random.Random(seed)
        self._models = models
        self._popularity = [1.0 / rank for rank in range(1, len(models) + 1)]
        self._gpus = [GpuUuid(f"GPU-{number}") for number in range(gpus)]
        self._bytes_held: dict[ResidencyKey, tuple[int, ...]] = {}
        self._specs = {spec.name: spec for spec in _instances(self._gpus)}
        self._queue: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._posted = 0
        self._last_ticket = 0
        self._waiting: dict[TicketId, Ticket] = {}
        self._queue_length = waiting
        self._models_by_blob = {model.blob: model for model in models}
        self._tick_at: float | None = None
        self.rejected = 0
        self._start()

    def play(self, until: float) -> None:
        """Runs until this time."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, callback = heapq.heappop(self._queue)
            event = callback()
            if event is not None:
                self._post(event)
            while len(self._waiting) < self._queue_length:
                self._post(Arrived(self._ticket()))
            self._set_timer()
        self.now = until

    def snapshot(self) -> Snapshot:
        return self.dispatcher.snapshot(self.now)

    # --- events ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._post(self._gpu_reading())
        for spec in self._specs.values():
            self._post(InstanceChanged(spec, InstanceState.READY, version=VERSION))
        self._later(_POLL_SECONDS, self._poll)
        for name in self._specs:
            self._later(self._rng.uniform(0.0, _POLL_SECONDS), lambda name=name: self._model_list(name))

    def _later(self, seconds: float, callback: Callable[[], Event | None]) -> None:
        self._posted += 1
        heapq.heappush(self._queue, (self.now + seconds, self._posted, callback))

    def _post(self, event: Event) -> None:
        for action in self._post_to(self.dispatcher, event, self.now):
            self._execute(action)

    def _set_timer(self) -> None:
        due = self.dispatcher.next_wake()
        if due is not None and due != self._tick_at and due != float("inf"):
            self._tick_at = due
            self._later(max(0.01, due - self.now), lambda: self._tick(due))

    def _tick(self, due: float) -> Event | None:
        if self._tick_at != due:
            return None
        self._tick_at = None
        return Ticked()

    def _poll(self) -> Event:
        self._later(_POLL_SECONDS, self._poll)
        return self._gpu_reading()

    def _gpu_reading(self) -> GpusRead:
        used = dict.fromkeys(self._gpus, 0)
        for key, sizes in self._bytes_held.items():
            for gpu, size in zip(self._specs[key[0]].gpus, sizes, strict=True):
                used[gpu] += size
        gpus = (
            Gpu(gpu, index, "a GPU", GPU_BYTES, GPU_BYTES - used[gpu], used[gpu])
            for index, gpu in enumerate(self._gpus)
        )
        return GpusRead(tuple(gpus), self.now)

    def _model_list(self, name: InstanceName) -> Event | None:
        if name not in self._specs:
            return None
        self._later(_POLL_SECONDS, lambda: self._model_list(name))
        residencies = self.dispatcher.snapshot(self.now).residencies
        in_transition = (ResidencyState.PLANNED, ResidencyState.LOADING)
        loaded = [
            (self._models_by_blob[key[1]], sum(sizes))
            for key, sizes in self._bytes_held.items()
            if key[0] == name and residencies[key].state not in in_transition
        ]
        rows = tuple(LoadedModel(model.name, model.digest, size, size, 8192, model) for model, size in loaded)
        return ResidencyRead(name, rows, self.now)

    def _ticket(self) -> Ticket:
        self._last_ticket += 1
        model = self._rng.choices(self._models, self._popularity)[0]
        client = f"client{self._last_ticket % _CLIENTS}"
        ticket = Ticket(TicketId(self._last_ticket), model, (), 0, None, self.now, self.now + 300.0, client,
                        f"{client}-{self._last_ticket % 97}", prompt_tokens=self._rng.randint(50, 4000))  # fmt: skip
        self._waiting[ticket.id] = ticket
        return ticket

    # --- actions ---------------------------------------------------------------------------------------------

    def _execute(self, action: Action) -> None:
        match action:
            case Grant():
                del self._waiting[action.ticket_id]
                seconds = self._rng.expovariate(1 / 8.0) + 0.2
                ended = Released(action.ticket_id, output_tokens=int(30 * seconds))
                self._later(seconds, lambda: ended)
            case Reject():
                self.rejected += 1
                del self._waiting[action.ticket_id]
            case Load():
                self._load(action)
            case Unload():
                self._later(0.3, lambda: self._unloaded((action.instance, action.blob)))
            case StartInstance():
                self._specs[action.spec.name] = action.spec
                self._later(0.3, lambda: InstanceChanged(action.spec, InstanceState.READY, version=VERSION))
                self._later(0.6, lambda: self._model_list(action.spec.name))
            case StopInstance():
                spec = self._specs.pop(action.instance)
                self._later(0.1, lambda: InstanceChanged(spec, InstanceState.STOPPED))
            case ReadGpus():
                self._later(0.01, self._gpu_reading)
            case _:
                pass

    def _load(self, load: Load) -> None:
        sizes = _RULES.estimate_bytes(load.model, self._specs[load.instance], 8192, self.snapshot())
        self._bytes_held[load.instance, load.model.blob] = sizes
        seconds = 0.5 + load.model.weights_bytes / _LOAD_BYTES_PER_SECOND
        self._later(seconds, lambda: LoadFinished(load.load_id, sum(sizes), sum(sizes)))

    def _unloaded(self, key: ResidencyKey) -> Event:
        self._bytes_held.pop(key, None)
        return UnloadFinished(key[0], key[1])


def _instances(gpus: list[GpuUuid]) -> Iterator[InstanceSpec]:
    for number, gpu in enumerate(gpus):
        yield _spec(f"gpu{number}", (gpu,))
    if len(gpus) > 1:
        yield _spec("spread", tuple(gpus))


def _spec(name: str, gpus: tuple[GpuUuid, ...]) -> InstanceSpec:
    return InstanceSpec(InstanceName(name), gpus, f"http://127.0.0.1/{name}", kv_cache_type="q8_0",
                        flash_attention=True, environment={"OLLAMA_SCHED_SPREAD": "1"})  # fmt: skip
