"""Looks for a good residency plan with the whole trace known: what can be had beside what the floor says cannot.

From a few plain plans (the most asked for first, the largest, the smallest, what each stretch asks) it changes one
thing at random and keeps what is no worse. No claim that there is none better: it is what a search of so many tries
finds.
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
"""Requests in time, then bytes not loaded."""


def search(scenario: Scenario, config: ServerConfig, tries: int = TRIES, seed: int = 1) -> Plan:
    """The best plan that so many tries found; the same for the same seed."""
    rng = random.Random(seed)
    best, score = max(((plan, _score(scenario, config, plan)) for plan in _plain(scenario)), key=lambda one: one[1])
    for _ in range(tries):
        changed = _changed(best, list(scenario.models), rng)
        if changed == best:
            continue
        found = _score(scenario, config, changed)
        if found >= score:
            best, score = changed, found
    return best


def _score(scenario: Scenario, config: ServerConfig, plan: Plan) -> Score:
    outcome = Simulation(scenario, lambda machine, models: Planned(machine, models, config, plan)).run()
    return sum(is_in_time(request) for request in outcome.requests), -outcome.stats.loaded_bytes


def _plain(scenario: Scenario) -> list[Plan]:
    count = max(1, round(scenario.seconds / INTERVAL_SECONDS))
    asked = Counter(session.model for session in scenario.sessions for _ in session.turns)
    by_demand = [name for name, _ in asked.most_common()]
    by_size = sorted(scenario.models, key=lambda name: -scenario.models[name].weights_bytes)
    plans = [intervals(count, by_demand), intervals(count, by_size), intervals(count, reversed(by_size))]
    plans.append(_by_stretch(scenario, count))
    return [Plan(one, INTERVAL_SECONDS) for one in plans]


def _by_stretch(scenario: Scenario, count: int) -> tuple[tuple[str, ...], ...]:
    """What is asked for in a stretch, most first."""
    asked: list[Counter[str]] = [Counter() for _ in range(count)]
    for session in scenario.sessions:
        for turn in session.turns:
            asked[min(count - 1, int(turn.at_seconds / INTERVAL_SECONDS))][session.model] += 1
    return tuple(tuple(name for name, _ in one.most_common()) for one in asked)


def _changed(plan: Plan, names: list[str], rng: random.Random) -> Plan:
    """A model comes, goes or gets another rank in some stretches that follow each other."""
    begin = rng.randrange(len(plan.intervals))
    end = min(len(plan.intervals), begin + rng.choice((1, 1, 2, 3, 5, 8, len(plan.intervals))))
    name, change = rng.choice(names), rng.randrange(3)
    changed = list(plan.intervals)
    for index in range(begin, end):
        rest = tuple(other for other in changed[index] if other != name)
        if change == 0:
            changed[index] = rest
        elif change == 1:
            changed[index] = (name, *rest)
        else:
            changed[index] = (*rest, name)
    return Plan(tuple(changed), plan.seconds)
