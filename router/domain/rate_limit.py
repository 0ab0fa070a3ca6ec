"""A rate limit as a bucket that fills evenly: pure arithmetic on the time at which it will be full.

A bucket of N a minute holds N when it is full. Each use takes from it; it gains N per minute. All that has to be known
of one is `full_at`, when it is full again if nothing more is taken: in the past for a full one. A use may turn out to
be larger than what was there; then `full_at` is more than the whole filling time away, and that is paid back before
the next use.
"""

from __future__ import annotations

from math import ceil

MINUTE_SECONDS = 60.0
DAY_SECONDS = 86_400.0


def level_at(full_at: float, capacity: int, fill_seconds: float, now: float) -> float:
    """What is in the bucket now; negative where more was taken than there was."""
    return capacity - max(0.0, full_at - now) * capacity / fill_seconds


def full_after(full_at: float, amount: float, seconds_each: float, now: float) -> float:
    """`full_at` after that amount is taken, or, if it is negative, given back.

    `seconds_each`: in which the bucket gains one.
    """
    return (full_at if full_at > now else now) + amount * seconds_each


def seconds_until(amount: float, full_at: float, capacity: int, fill_seconds: float, now: float) -> int:
    """Whole seconds, rounded up, until that amount can be taken; 0 if it can be now.

    An amount that is larger than the bucket needs a full one, so that it is possible at all.
    """
    missing_seconds = full_at - now - fill_seconds * (1.0 - min(1.0, amount / capacity))
    return ceil(missing_seconds - 1e-9) if full_at > now and missing_seconds > 1e-9 else 0
