"""Runs one simulation: a machine, a workload, a baseline and faults, in virtual time.

Deterministic: the same scenario and baseline give the same run, byte for byte. `router.lab.simulator.metrics` computes
the figures of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from router.domain.model import ModelFacts
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.faults import Fault, FaultTarget, schedule_faults
from router.lab.simulator.gpus import GpuLedger, SimGpu
from router.lab.simulator.machine import Machine, RunStats
from router.lab.simulator.requests import HUNG_UP, SERVED, Request
from router.lab.simulator.timeline import Timeline
from router.lab.simulator.weight_transfer import PageCache, WeightTransfers
from router.lab.simulator.workload import THINK_TIME_SECONDS, Session
from router.lab.simulator.world import WORLD, World

GIB = 1024**3
_GRACE_SECONDS = 900.0
"""How long after the last arrival a run may continue until all requests have ended."""
UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Scenario:
    """All inputs of a run except the baseline."""

    gpus: tuple[SimGpu, ...]
    models: Mapping[str, ModelFacts]
    sessions: tuple[Session, ...]
    seconds: float
    active_shares: Mapping[str, float] = field(default_factory=dict[str, float])
    faults: tuple[Fault, ...] = ()
    world: World = WORLD
    page_cache_bytes: int = 112 * GIB
    cold_start: bool = False
    """Whether the page cache is empty at the start."""
    deviation_seed: int | None = None
    """Seed of loads that differ from their usual size by some percent and of slow memory recovery; None: off."""


class Baseline(FaultTarget, Protocol):
    """A scheduling policy that serves requests on a machine."""

    def start(self) -> None:
        """Called once, at the start of the run."""
        ...

    def submit(self, request: Request, done: OnFinished) -> None:
        """`done` is called once, unless the request is cancelled first."""
        ...

    def cancel(self, request: Request) -> None:
        """The client disconnected."""
        ...


BaselineFactory = Callable[[Machine, Mapping[str, ModelFacts]], Baseline]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run."""

    requests: tuple[Request, ...]
    stats: RunStats
    ledger: GpuLedger
    ended_at: float
    planned: int
    """Number of turns in all sessions. Turns after one that never ended did not arrive."""


class Simulation:
    """Simulates one scenario. `run` may be called once."""

    def __init__(self, scenario: Scenario, make_baseline: BaselineFactory) -> None:
        timeline = Timeline()
        cache = PageCache(scenario.page_cache_bytes)
        ledger = GpuLedger(scenario.gpus)
        transfers = WeightTransfers(timeline, scenario.world, cache)
        if not scenario.cold_start:
            for model in scenario.models.values():
                cache.read(model.blob, model.weights_bytes)
        self.machine = Machine(
            timeline, scenario.world, ledger, transfers, RunStats(), scenario.active_shares, scenario.deviation_seed
        )
        self.baseline = make_baseline(self.machine, scenario.models)
        self._scenario = scenario
        self._requests: list[Request] = []
        self._unfinished = 0

    def run(self, after_step: Callable[[], None] | None = None) -> Outcome:
        """Runs to the end. `after_step` is called after each timeline event."""
        timeline, scenario = self.machine.timeline, self._scenario
        self.baseline.start()
        schedule_faults(self.machine, self.baseline, scenario.faults)
        for session in scenario.sessions:
            self._schedule_turn(session, 0, 0.0)
        limit = scenario.seconds + _GRACE_SECONDS
        while self._unfinished and timeline.step():
            if after_step is not None:
                after_step()
            if timeline.now > limit:
                break
        for request in self._requests:
            if not request.outcome:
                request.outcome = UNFINISHED
        planned = sum(len(session.turns) for session in scenario.sessions)
        return Outcome(tuple(self._requests), self.machine.stats, self.machine.ledger, timeline.now, planned)

    def _schedule_turn(self, session: Session, index: int, not_before: float) -> None:
        if index < len(session.turns):
            self._unfinished += 1
            due = max(session.turns[index].at_seconds, not_before)
            self.machine.timeline.at(due, lambda: self._arrive(session, index))

    def _arrive(self, session: Session, index: int) -> None:
        turn = session.turns[index]
        request = Request(
            id=len(self._requests) + 1,
            user=session.user,
            session=session.id,
            turn=index,
            model=self._scenario.models[session.model],
            prompt_tokens=turn.prompt_tokens,
            shared_tokens=turn.shared_tokens,
            generated_tokens=turn.generated_tokens,
            hang_up_after_seconds=turn.hang_up_after_seconds,
            arrived_at=self.machine.timeline.now,
        )
        self._requests.append(request)
        if request.hang_up_after_seconds is not None:
            self.machine.timeline.after(request.hang_up_after_seconds, lambda: self._hang_up(request, session, index))
        self.baseline.submit(request, lambda r, error: self._ended(r, error or SERVED, session, index))

    def _hang_up(self, request: Request, session: Session, index: int) -> None:
        if not request.outcome:
            self.baseline.cancel(request)
            self._ended(request, HUNG_UP, session, index)

    def _ended(self, request: Request, outcome: str, session: Session, index: int) -> None:
        if request.outcome:
            raise AssertionError(f"request {request.id} ended twice: {request.outcome}, then {outcome}")
        request.outcome = outcome
        request.ended_at = self.machine.timeline.now
        self._unfinished -= 1
        self._schedule_turn(session, index + 1, self.machine.timeline.now + THINK_TIME_SECONDS)
