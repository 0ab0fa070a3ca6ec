"""A machine in memory that is always asked for more than it can serve: what the deciding core is timed on.

GPUs, instances, loads and requests under a clock of its own; whatever the dispatcher asks for comes true after as
long as it would take. So many tickets always wait: one that is granted is followed by the next. The same seed plays the
same.
It measures nothing and judges nothing; sizes are exactly what the core estimates.
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
from router.engines.ollama.footprint_estimator import estimate_bytes
from router.scheduler.dispatcher import Dispatcher

GPU_BYTES = 24 * 1024**3
VERSION = "0.24.0"
_LOAD_BYTES_PER_SECOND = 3e9
_POLL_SECONDS = 1.0
_CLIENTS = 12

Post = Callable[[Dispatcher, Event, float], list[Action]]
"""Hands the event to the dispatcher; whoever passes it in may look at what that takes."""


def some_models(kinds: list[ModelFacts], count: int) -> list[ModelFacts]:
    """So many models of the sizes of `kinds`, each with weights of its own."""
    return [
        replace(
            kinds[number % len(kinds)], name=f"model{number}", digest=f"{number:064x}", blob=BlobDigest(f"b{number}")
        )
        for number in range(count)
    ]


class BusyMachine:
    """One instance a GPU and one over all; models are asked for by Zipf's law."""

    def __init__(self, gpus: int, models: list[ModelFacts], waiting: int, seed: int, post: Post) -> None:
        self.policy = Policy(
            instances_on_demand=True,
            on_demand_like=_spec("", ()),
            queue_limit=max(512, 2 * waiting),
            constants=SchedulerConstants(unseen_margin_ratio=0.02),
        )
        self.dispatcher = Dispatcher(self.policy, estimate_bytes)
        self.now = 0.0
        self._post_to = post
        self._rng = random.Random(seed)
        self._models = models
        self._shares = [1.0 / rank for rank in range(1, len(models) + 1)]
        self._gpus = [GpuUuid(f"GPU-{number}") for number in range(gpus)]
        self._held: dict[ResidencyKey, tuple[int, ...]] = {}
        self._specs = {spec.name: spec for spec in _instances(self._gpus)}
        self._queue: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._posted = 0
        self._last = 0
        self._waiting: dict[TicketId, Ticket] = {}
        self._wanted = waiting
        self._facts = {model.blob: model for model in models}
        self._tick_at: float | None = None
        self.rejected = 0
        self._start()

    def play(self, until: float) -> None:
        """Lets that much happen."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, happens = heapq.heappop(self._queue)
            event = happens()
            if event is not None:
                self._post(event)
            while len(self._waiting) < self._wanted:
                self._post(Arrived(self._ticket()))
            self._set_timer()
        self.now = until

    def snapshot(self) -> Snapshot:
        return self.dispatcher.snapshot(self.now)

    # --- what happens ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._post(self._reading())
        for spec in self._specs.values():
            self._post(InstanceChanged(spec, InstanceState.READY, version=VERSION))
        self._later(_POLL_SECONDS, self._poll)
        for name in self._specs:
            self._later(self._rng.uniform(0.0, _POLL_SECONDS), lambda name=name: self._listing(name))

    def _later(self, seconds: float, happens: Callable[[], Event | None]) -> None:
        self._posted += 1
        heapq.heappush(self._queue, (self.now + seconds, self._posted, happens))

    def _post(self, event: Event) -> None:
        for action in self._post_to(self.dispatcher, event, self.now):
            self._carry_out(action)

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
        return self._reading()

    def _reading(self) -> GpusRead:
        used = dict.fromkeys(self._gpus, 0)
        for key, sizes in self._held.items():
            for gpu, size in zip(self._specs[key[0]].gpus, sizes, strict=True):
                used[gpu] += size
        gpus = (
            Gpu(gpu, index, "a GPU", GPU_BYTES, GPU_BYTES - used[gpu], used[gpu])
            for index, gpu in enumerate(self._gpus)
        )
        return GpusRead(tuple(gpus), self.now)

    def _listing(self, name: InstanceName) -> Event | None:
        if name not in self._specs:
            return None
        self._later(_POLL_SECONDS, lambda: self._listing(name))
        known = self.dispatcher.snapshot(self.now).residencies
        rows = tuple(
            LoadedModel(self._facts[key[1]].name, self._facts[key[1]].digest, sum(sizes), sum(sizes), 8192,
                        self._facts[key[1]])
            for key, sizes in self._held.items()
            if key[0] == name and known[key].state not in (ResidencyState.PLANNED, ResidencyState.LOADING)
        )  # fmt: skip
        return ResidencyRead(name, rows, self.now)

    def _ticket(self) -> Ticket:
        self._last += 1
        model = self._rng.choices(self._models, self._shares)[0]
        client = f"client{self._last % _CLIENTS}"
        ticket = Ticket(TicketId(self._last), model, (), 0, None, self.now, self.now + 300.0, client,
                        f"{client}-{self._last % 97}", prompt_tokens=self._rng.randint(50, 4000))  # fmt: skip
        self._waiting[ticket.id] = ticket
        return ticket

    # --- what is asked for -----------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
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
                self._later(0.6, lambda: self._listing(action.spec.name))
            case StopInstance():
                spec = self._specs.pop(action.instance)
                self._later(0.1, lambda: InstanceChanged(spec, InstanceState.STOPPED))
            case ReadGpus():
                self._later(0.01, self._reading)
            case _:
                pass

    def _load(self, load: Load) -> None:
        sizes = estimate_bytes(load.model, self._specs[load.instance], 8192, self.snapshot())
        self._held[load.instance, load.model.blob] = sizes
        seconds = 0.5 + load.model.weights_bytes / _LOAD_BYTES_PER_SECOND
        self._later(seconds, lambda: LoadFinished(load.load_id, sum(sizes), sum(sizes)))

    def _unloaded(self, key: ResidencyKey) -> Event:
        self._held.pop(key, None)
        return UnloadFinished(key[0], key[1])


def _instances(gpus: list[GpuUuid]) -> Iterator[InstanceSpec]:
    for number, gpu in enumerate(gpus):
        yield _spec(f"gpu{number}", (gpu,))
    if len(gpus) > 1:
        yield _spec("spread", tuple(gpus))


def _spec(name: str, gpus: tuple[GpuUuid, ...]) -> InstanceSpec:
    return InstanceSpec(InstanceName(name), gpus, f"http://127.0.0.1/{name}", kv_cache_type="q8_0",
                        flash_attention=True, environment={"OLLAMA_SCHED_SPREAD": "1"})  # fmt: skip
