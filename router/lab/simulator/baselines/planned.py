"""Residency by a plan made beforehand: which models are on the GPUs in which stretch of time, whatever is asked.

It shows what could be had by somebody who knows the whole trace: it reads no memory before a load, loads side by side,
splits evenly over the smallest set of GPUs and lets a model finish what runs before it leaves. When the plan is over,
whoever has waited longest is loaded next. What plan is good is `router.lab.simulator.clairvoyant`'s to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from router.domain.gpu import GpuUuid
from router.domain.model import ModelFacts
from router.lab.simulator.baselines.floor import even_units
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.loaded_model import ModelRunner, Phase, ServerConfig, shape_of
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.world import true_bytes

_AFTERWARDS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of the models that shall be loaded in each stretch, the most wanted first."""

    intervals: tuple[tuple[str, ...], ...]
    seconds: float
    """Length of a stretch."""


class Planned:
    """Carries a plan out; models that find no room in their stretch are left out until there is some."""

    def __init__(self, machine: Machine, models: Mapping[str, ModelFacts], config: ServerConfig, plan: Plan) -> None:
        self._machine = machine
        self._models = models
        self._config = config
        self._plan = plan
        self._loaded: dict[str, ModelRunner] = {}
        self._leaving: set[str] = set()
        self._wanted: tuple[str, ...] = ()
        self._waiting: dict[str, list[tuple[Request, OnFinished]]] = {name: [] for name in models}

    def start(self) -> None:
        self._begin_stretch(0)

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = "plan"
        name = request.model.name
        if name in self._loaded and name not in self._leaving:
            self._serve(name, request, done)
        else:
            self._waiting[name].append((request, done))

    def cancel(self, request: Request) -> None:
        name = request.model.name
        self._waiting[name] = [entry for entry in self._waiting[name] if entry[0] is not request]
        found = self._loaded.get(name)
        if found is not None and found.cancel(request):
            self._left(name, found)

    def server_died(self, index: int) -> None:
        """Nothing goes wrong for a plan."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Nor this."""

    # --- carrying out --------------------------------------------------------------------------------------

    def _begin_stretch(self, index: int) -> None:
        intervals = self._plan.intervals
        is_planned = index < len(intervals)
        self._wanted = intervals[index] if is_planned else self._by_need()
        for name, found in list(self._loaded.items()):
            if name not in self._wanted:
                self._leaving.add(name)
                self._leave_if_idle(name, found)
            elif name in self._leaving and found.phase is Phase.READY:
                self._leaving.discard(name)
                self._flush(name)
        self._place()
        seconds = self._plan.seconds if is_planned else _AFTERWARDS_SECONDS
        self._machine.timeline.after(seconds, lambda: self._begin_stretch(index + 1))

    def _by_need(self) -> tuple[str, ...]:
        """Whoever has waited longest, then what is loaded."""
        heads = [(entries[0][0].arrived_at, name) for name, entries in self._waiting.items() if entries]
        return (*(name for _, name in sorted(heads)), *(name for name, one in self._loaded.items() if one.users))

    def _place(self) -> None:
        for name in self._wanted:
            if name not in self._loaded:
                self._load(name)

    def _load(self, name: str) -> None:
        model = self._models[name]
        layout = self._room_for(model)
        if layout is None:
            return
        gpus, layers = layout
        found = ModelRunner.plan(
            self._machine, "plan", model, self._config, gpus, layers, shape_of(model, self._config)
        )
        found.allocate()
        self._loaded[name] = found
        found.begin(lambda: self._ready(name, found))
        self._flush(name)

    def _room_for(self, model: ModelFacts) -> tuple[tuple[GpuUuid, ...], tuple[int, ...]] | None:
        """The smallest set of GPUs with room for even parts; of those the one that is left with least."""
        ledger, shape = self._machine.ledger, shape_of(model, self._config)
        gpus = [gpu.uuid for gpu in ledger.gpus]
        for count in range(1, len(gpus) + 1):
            layers = even_units(model.layers + 1, count)
            sizes = true_bytes(self._machine.world, model, shape, layers)
            fitting = [
                chosen
                for chosen in combinations(gpus, count)
                if all(ledger.free_bytes(uuid) >= size for uuid, size in zip(chosen, sizes, strict=True))
            ]
            if fitting:
                return min(fitting, key=lambda chosen: sum(ledger.free_bytes(uuid) for uuid in chosen)), layers
        return None

    def _ready(self, name: str, found: ModelRunner) -> None:
        found.ready()
        self._leave_if_idle(name, found)

    def _flush(self, name: str) -> None:
        entries, self._waiting[name] = self._waiting[name], []
        for request, done in entries:
            self._serve(name, request, done)

    def _serve(self, name: str, request: Request, done: OnFinished) -> None:
        found = self._loaded[name]

        def ended(served: Request, error: str) -> None:
            self._left(name, found)
            done(served, error)

        found.serve(request, ended)

    def _left(self, name: str, found: ModelRunner) -> None:
        found.users -= 1
        self._leave_if_idle(name, found)

    def _leave_if_idle(self, name: str, found: ModelRunner) -> None:
        if name in self._leaving and found.users == 0 and found.phase is Phase.READY:
            found.phase = Phase.UNLOADING
            self._machine.timeline.after(self._machine.world.kill_seconds, lambda: self._gone(name, found))

    def _gone(self, name: str, found: ModelRunner) -> None:
        found.end()
        del self._loaded[name]
        self._leaving.discard(name)
        self._place()


def intervals(count: int, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The same in each of so many stretches."""
    return (tuple(names),) * count
