"""How true the waits are that waiting clients are told: `make bench-waits`.

SIMULATED. The router's own core tells once a second how long each waiting request will still wait for its slot; what it
told is compared with what came. Told well is what is no more than three seconds wrong, or no more than twice or half.
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
_NEAR_SECONDS = 3.0
_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class Told:
    """What requests were told, and what came."""

    pairs: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Seconds told and seconds waited from then on."""
    untold: int = 0
    """Times that nothing could be said."""
    _open: dict[TicketId, list[tuple[float, float]]] = field(default_factory=dict[TicketId, list[tuple[float, float]]])
    _next: float = 0.0

    def look(self, dispatcher: Dispatcher, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Grant):
                self.pairs += [(told, now - at) for at, told in self._open.pop(action.ticket_id, ())]
        if now < self._next:
            return
        self._next = now + _EVERY_SECONDS
        for ticket, wait_estimate in dispatcher.wait_estimates(now).items():
            if wait_estimate.expected_wait_seconds is None:
                self.untold += 1
            else:
                self._open.setdefault(ticket, []).append((now, wait_estimate.expected_wait_seconds))

    @property
    def well_told(self) -> float:
        """The share that was told well."""
        return mean(abs(a - b) <= _NEAR_SECONDS or a / 2 <= b <= 2 * a for a, b in self.pairs)


def tell(cell: str, seeds: Sequence[int], rows: tuple[TraceRow, ...]) -> Told:
    """All that was told in one cell, such as `4x3090/wide`, with this trace."""
    told = Told()
    rig, _, mix = cell.partition("/")
    for seed in seeds:
        one = _one_run(make_scenario(ScenarioSpec(rig, mix, seed), rows))
        told.pairs += one.pairs
        told.untold += one.untold
    return told


def _one_run(scenario: Scenario) -> Told:
    told = Told()
    made: list[Llamayard] = []

    def observe(event: Event, actions: list[Action], now: float) -> None:
        del event
        told.look(made[0].dispatcher, actions, now)

    def watched(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        router = make(machine, models)
        assert isinstance(router, Llamayard)
        made.append(router)
        return router

    make = make_baseline("llamayard", scenario, observer=observe)
    Simulation(scenario, watched).run()
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows = read_trace()
    sys.stdout.write("SIMULATED\n| cell | times told | told, mean | came, mean | wrong by, median, p90 | told well |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for cell in CELLS:
        told = tell(cell, range(1, given.seeds + 1), rows)
        wrong = [abs(a - b) for a, b in told.pairs]
        sys.stdout.write(
            f"| {cell} | {len(wrong)} of {len(wrong) + told.untold} | {mean(a for a, _ in told.pairs):.1f} s "
            f"| {mean(b for _, b in told.pairs):.1f} s | {median(wrong):.1f}, {quantiles(wrong, n=10)[-1]:.1f} s "
            f"| {100 * told.well_told:.0f} % |\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
