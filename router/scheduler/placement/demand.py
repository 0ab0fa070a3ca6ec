"""How much each model is asked for of late, and how long its requests take: what decides who is cheap to evict.

A count of requests that halves with every half-life, and a running mean of how long a slot is held. Pure values.
"""

from __future__ import annotations

import math

from router.domain.snapshot import Demand

_NEW_SHARE = 0.2
"""Of the newest duration in the mean of durations."""


def record_request(demand: Demand, now: float, half_life_seconds: float, amount: float = 1.0) -> Demand:
    """One request more, or so much of something else that is counted."""
    return Demand(_decayed(demand, now, half_life_seconds) + amount, now, demand.service_seconds)


def served(demand: Demand, seconds: float) -> Demand:
    """One request has held its slot for so long."""
    before = demand.service_seconds
    mean = seconds if before is None else before + _NEW_SHARE * (seconds - before)
    return Demand(demand.weight, demand.at, mean)


def rate_per_second(demand: Demand | None, now: float, half_life_seconds: float) -> float:
    """Requests a second, as of now; a steady stream of r a second comes out as r."""
    if demand is None:
        return 0.0
    return _decayed(demand, now, half_life_seconds) * math.log(2.0) / half_life_seconds


def _decayed(demand: Demand, now: float, half_life_seconds: float) -> float:
    return demand.weight * 0.5 ** (max(0.0, now - demand.at) / half_life_seconds)
