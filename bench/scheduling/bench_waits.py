"""Benchmarks the accuracy of the wait estimates that waiting clients get: `make bench-waits`. SIMULATED.

Once a second the scheduler estimates the remaining wait of each waiting request; the estimate is compared with the
actual wait. An estimate is accurate if it is off by at most three seconds or by at most a factor of two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles

from router.domain.actions import Action, Grant
from router.domain.events import Event
from router.domain.model import ModelFacts
from router.domain.request import TicketId
from router.lab.scenarios import ScenarioSpec, make_baseline, make_scenario
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.machine import Machine
from router.lab.simulator.runner import Baseline, Scenario, Simulation
from router.lab.simulator.workload import TraceRow, read_trace
from router.scheduler.dispatcher import Dispatcher

CELLS = ("2x3090/team", "2x3090/wide", "4x3090/team", "4x3090/wide", "2xa6000/wide")
_TOLERANCE_SECONDS = 3.0
_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class WaitEstimates:
    """Wait estimates and actual waits."""

    pairs: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """(estimated, actual) seconds."""
    without_estimate: int = 0
    """Number of times no estimate was available."""
    _open: dict[TicketId, list[tuple[float, float]]] = field(default_factory=dict[TicketId, list[tuple[float, float]]])
    _next: float = 0.0

    def record(self, dispatcher: Dispatcher, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Grant):
                self.pairs += [(estimated, now - at) for at, estimated in self._open.pop(action.ticket_id, ())]
        if now < self._next:
            return
        self._next = now + _EVERY_SECONDS
        for ticket, wait_estimate in dispatcher.wait_estimates(now).items():
            if wait_estimate.expected_wait_seconds is None:
                self.without_estimate += 1
            else:
                self._open.setdefault(ticket, []).append((now, wait_estimate.expected_wait_seconds))

    @property
    def accurate_share(self) -> float:
        """Share of accurate estimates."""
        return mean(
            abs(estimated - actual) <= _TOLERANCE_SECONDS or estimated / 2 <= actual <= 2 * estimated
            for estimated, actual in self.pairs
        )


def measure(cell: str, seeds: Sequence[int], rows: tuple[TraceRow, ...]) -> WaitEstimates:
    """Collects the estimates of one cell, for example `4x3090/wide`, over these seeds."""
    estimates = WaitEstimates()
    rig, _, mix = cell.partition("/")
    for seed in seeds:
        single_run = _one_run(make_scenario(ScenarioSpec(rig, mix, seed), rows))
        estimates.pairs += single_run.pairs
        estimates.without_estimate += single_run.without_estimate
    return estimates


def _one_run(scenario: Scenario) -> WaitEstimates:
    estimates = WaitEstimates()
    routers: list[Llamayard] = []

    def observe(event: Event, actions: list[Action], now: float) -> None:
        del event
        estimates.record(routers[0].dispatcher, actions, now)

    def make_and_keep(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        router = factory(machine, models)
        assert isinstance(router, Llamayard)
        routers.append(router)
        return router

    factory = make_baseline("llamayard", scenario, observer=observe)
    Simulation(scenario, make_and_keep).run()
    return estimates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = read_trace()
    sys.stdout.write(
        "SIMULATED\n| cell | estimates | estimated, mean | actual, mean | error, median, p90 | accurate |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for cell in CELLS:
        estimates = measure(cell, range(1, args.seeds + 1), rows)
        errors = [abs(estimated - actual) for estimated, actual in estimates.pairs]
        estimated_mean = mean(estimated for estimated, _ in estimates.pairs)
        actual_mean = mean(actual for _, actual in estimates.pairs)
        sys.stdout.write(
            f"| {cell} | {len(errors)} of {len(errors) + estimates.without_estimate} | {estimated_mean:.1f} s "
            f"| {actual_mean:.1f} s | {median(errors):.1f}, {quantiles(errors, n=10)[-1]:.1f} s "
            f"| {100 * estimates.accurate_share:.0f} % |\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
