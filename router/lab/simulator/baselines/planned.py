"""Baseline with a fixed residency plan: which models are on the GPUs in each time interval, whatever is requested.

It shows what is achievable with the whole trace known: it does not read memory before a load, loads concurrently,
splits evenly over the smallest set of GPUs and drains a model before unloading it. After the last interval the model
whose request has waited longest is loaded next. `router.lab.simulator.clairvoyant` searches for the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from router.domain.gpu import GpuUuid
from router.domain.model import ModelFacts
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.loaded_model import ModelRunner, Phase, ServerConfig, shape_of
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.true_footprint import true_gpu_bytes

_AFTER_PLAN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of the models to keep loaded in each interval, highest priority first."""

    intervals: tuple[tuple[str, ...], ...]
    seconds: float
    """Length of an interval."""


class Planned:
    """Executes a plan. A model that does not fit in its interval is loaded once there is room."""

    def __init__(self, machine: Machine, models: Mapping[str, ModelFacts], config: ServerConfig, plan: Plan) -> None:
        self._machine = machine
        self._models = models
        self._config = config
        self._plan = plan
        self._loaded: dict[str, ModelRunner] = {}
        self._draining: set[str] = set()
        self._planned_models: tuple[str, ...] = ()
        self._waiting: dict[str, list[tuple[Request, OnFinished]]] = {name: [] for name in models}

    def start(self) -> None:
        self._begin_interval(0)

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = "plan"
        name = request.model.name
        if name in self._loaded and name not in self._draining:
            self._serve(name, request, done)
        else:
            self._waiting[name].append((request, done))

    def cancel(self, request: Request) -> None:
        name = request.model.name
        self._waiting[name] = [entry for entry in self._waiting[name] if entry[0] is not request]
        runner = self._loaded.get(name)
        if runner is not None and runner.cancel(request):
            self._request_ended(name, runner)

    def server_died(self, index: int) -> None:
        """Faults do not affect a plan."""

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Faults do not affect a plan."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Faults do not affect a plan."""

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """Faults do not affect a plan."""

    def restart_all(self) -> None:
        """Faults do not affect a plan."""

    # --- execution -----------------------------------------------------------------------------------------

    def _begin_interval(self, index: int) -> None:
        intervals = self._plan.intervals
        is_planned = index < len(intervals)
        self._planned_models = intervals[index] if is_planned else self._by_waiting_time()
        for name, runner in list(self._loaded.items()):
            if name not in self._planned_models:
                self._draining.add(name)
                self._unload_if_idle(name, runner)
            elif name in self._draining and runner.phase is Phase.READY:
                self._draining.discard(name)
                self._flush(name)
        self._load_planned()
        seconds = self._plan.seconds if is_planned else _AFTER_PLAN_SECONDS
        self._machine.timeline.after(seconds, lambda: self._begin_interval(index + 1))

    def _by_waiting_time(self) -> tuple[str, ...]:
        """Models of waiting requests, longest wait first, then the loaded models in use."""
        heads = [(entries[0][0].arrived_at, name) for name, entries in self._waiting.items() if entries]
        return (*(name for _, name in sorted(heads)), *(name for name, one in self._loaded.items() if one.users))

    def _load_planned(self) -> None:
        for name in self._planned_models:
            if name not in self._loaded:
                self._load(name)

    def _load(self, name: str) -> None:
        model = self._models[name]
        layout = self._find_layout(model)
        if layout is None:
            return
        gpus, layers = layout
        runner = ModelRunner.plan(
            self._machine, "plan", model, self._config, gpus, layers, shape_of(model, self._config)
        )
        runner.allocate()
        self._loaded[name] = runner
        runner.begin(lambda: self._ready(name, runner))
        self._flush(name)

    def _find_layout(self, model: ModelFacts) -> tuple[tuple[GpuUuid, ...], tuple[int, ...]] | None:
        """The smallest set of GPUs that holds an even split, of those the tightest fit. None if nothing fits."""
        ledger, shape = self._machine.ledger, shape_of(model, self._config)
        gpus = [gpu.uuid for gpu in ledger.gpus]
        for count in range(1, len(gpus) + 1):
            layers = even_units(model.layers + 1, count)
            sizes = true_gpu_bytes(model, shape, layers)
            fitting = [
                chosen
                for chosen in combinations(gpus, count)
                if all(ledger.free_bytes(uuid) >= size for uuid, size in zip(chosen, sizes, strict=True))
            ]
            if fitting:
                return min(fitting, key=lambda chosen: sum(ledger.free_bytes(uuid) for uuid in chosen)), layers
        return None

    def _ready(self, name: str, runner: ModelRunner) -> None:
        runner.ready()
        self._unload_if_idle(name, runner)

    def _flush(self, name: str) -> None:
        entries, self._waiting[name] = self._waiting[name], []
        for request, done in entries:
            self._serve(name, request, done)

    def _serve(self, name: str, request: Request, done: OnFinished) -> None:
        runner = self._loaded[name]

        def ended(served: Request, error: str) -> None:
            self._request_ended(name, runner)
            done(served, error)

        runner.serve(request, ended)

    def _request_ended(self, name: str, runner: ModelRunner) -> None:
        runner.users -= 1
        self._unload_if_idle(name, runner)

    def _unload_if_idle(self, name: str, runner: ModelRunner) -> None:
        if name in self._draining and runner.users == 0 and runner.phase is Phase.READY:
            runner.phase = Phase.UNLOADING
            self._machine.timeline.after(self._machine.world.kill_seconds, lambda: self._unloaded(name, runner))

    def _unloaded(self, name: str, runner: ModelRunner) -> None:
        runner.end()
        del self._loaded[name]
        self._draining.discard(name)
        self._load_planned()


def even_units(units: int, parts: int) -> tuple[int, ...]:
    """As even as possible; the first parts get the remainder."""
    each, rest = divmod(units, parts)
    return tuple(each + (index < rest) for index in range(parts))


def intervals(count: int, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The same models in each of `count` intervals."""
    return (tuple(names),) * count
