"""Clairvoyant scheduling: searches for a good residency plan with the whole trace known in advance.

Local search from a few simple plans (most requested model first, largest, smallest, demand per interval): it mutates
the plan at random and keeps every change that is no worse. The result shows what is achievable; it is not an optimum.
"""

from __future__ import annotations

import random
from collections import Counter

from router.lab.simulator.baselines.planned import Plan, Planned, intervals
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.metrics import is_in_time
from router.lab.simulator.runner import Scenario, Simulation

INTERVAL_SECONDS = 20.0
TRIES = 300

Score = tuple[int, int]
"""(requests in time, negated loaded bytes); higher is better."""


def search(scenario: Scenario, config: ServerConfig, tries: int = TRIES, seed: int = 1) -> Plan:
    """Returns the best plan found in `tries` mutations; deterministic for a seed."""
    rng = random.Random(seed)
    best, score = max(
        ((plan, _score(scenario, config, plan)) for plan in _initial_plans(scenario)), key=lambda scored: scored[1]
    )
    for _ in range(tries):
        candidate = _mutate(best, list(scenario.models), rng)
        if candidate == best:
            continue
        candidate_score = _score(scenario, config, candidate)
        if candidate_score >= score:
            best, score = candidate, candidate_score
    return best


def _score(scenario: Scenario, config: ServerConfig, plan: Plan) -> Score:
    outcome = Simulation(scenario, lambda machine, models: Planned(machine, models, config, plan)).run()
    return sum(is_in_time(request) for request in outcome.requests), -outcome.stats.loaded_bytes


def _initial_plans(scenario: Scenario) -> list[Plan]:
    count = max(1, round(scenario.seconds / INTERVAL_SECONDS))
    requested = Counter(session.model for session in scenario.sessions for _ in session.turns)
    by_demand = [name for name, _ in requested.most_common()]
    by_size = sorted(scenario.models, key=lambda name: -scenario.models[name].weights_bytes)
    plans = [intervals(count, by_demand), intervals(count, by_size), intervals(count, reversed(by_size))]
    plans.append(_by_interval(scenario, count))
    return [Plan(entry, INTERVAL_SECONDS) for entry in plans]


def _by_interval(scenario: Scenario, count: int) -> tuple[tuple[str, ...], ...]:
    """The models requested in each interval, most requested first."""
    requested: list[Counter[str]] = [Counter() for _ in range(count)]
    for session in scenario.sessions:
        for turn in session.turns:
            requested[min(count - 1, int(turn.at_seconds / INTERVAL_SECONDS))][session.model] += 1
    return tuple(tuple(name for name, _ in entry.most_common()) for entry in requested)


def _mutate(plan: Plan, names: list[str], rng: random.Random) -> Plan:
    """Adds, removes or reranks one model in some consecutive intervals."""
    begin = rng.randrange(len(plan.intervals))
    end = min(len(plan.intervals), begin + rng.choice((1, 1, 2, 3, 5, 8, len(plan.intervals))))
    name, change = rng.choice(names), rng.randrange(3)
    candidate = list(plan.intervals)
    for index in range(begin, end):
        others = tuple(other for other in candidate[index] if other != name)
        if change == 0:
            candidate[index] = others
        elif change == 1:
            candidate[index] = (name, *others)
        else:
            candidate[index] = (*others, name)
    return Plan(tuple(candidate), plan.seconds)
