"""Recent demand for each model: a decaying count of requests, and the mean time that they hold a slot.

The price of an eviction depends on both. Pure functions.
"""

from __future__ import annotations

import math

from router.domain.snapshot import Demand

_NEW_SHARE = 0.2
"""Weight of the newest duration in the running mean."""


def record_request(demand: Demand, now: float, half_life_seconds: float, amount: float = 1.0) -> Demand:
    """The demand after one more request, or after `amount` of another quantity."""
    return Demand(_decayed(demand, now, half_life_seconds) + amount, now, demand.service_seconds)


def served(demand: Demand, seconds: float) -> Demand:
    """The demand after a request has held its slot for `seconds`."""
    old_mean = demand.service_seconds
    mean = seconds if old_mean is None else old_mean + _NEW_SHARE * (seconds - old_mean)
    return Demand(demand.weight, demand.at, mean)


def rate_per_second(demand: Demand | None, now: float, half_life_seconds: float) -> float:
    """Requests per second as of `now`; a steady rate r gives r."""
    if demand is None:
        return 0.0
    return _decayed(demand, now, half_life_seconds) * math.log(2.0) / half_life_seconds


def _decayed(demand: Demand, now: float, half_life_seconds: float) -> float:
    return demand.weight * 0.5 ** (max(0.0, now - demand.at) / half_life_seconds)
