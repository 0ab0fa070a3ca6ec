"""Bounds how many requests are tried again, so that retries do not double the load of a machine in trouble."""

from __future__ import annotations

WINDOW_SECONDS = 60
RATIO_MAX = 0.2
"""Retries per request over the window."""
RETRIES_MIN = 10
"""Retries per window that are allowed whatever the load, so that a single user's request can be tried again."""


class RetryBudget:
    """Counts requests and retries over the last minute, in slots of a second. Mutable, owned by the proxy."""

    __slots__ = ("_requests", "_retries", "_second")

    def __init__(self) -> None:
        self._requests = [0] * WINDOW_SECONDS
        self._retries = [0] * WINDOW_SECONDS
        self._second = 0

    def request(self, now: float) -> None:
        """A request came; `now` in seconds of a monotonic clock."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        self._requests[second % WINDOW_SECONDS] += 1

    def try_retry(self, now: float) -> bool:
        """Counts a retry; returns False, and counts nothing, if the budget is used up."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        if sum(self._retries) >= max(RETRIES_MIN, RATIO_MAX * sum(self._requests)):
            return False
        self._retries[second % WINDOW_SECONDS] += 1
        return True

    def _advance(self, second: int) -> None:
        """Empties the slots of the seconds since the last call."""
        for each in range(max(self._second + 1, second - WINDOW_SECONDS + 1), second + 1):
            self._requests[each % WINDOW_SECONDS] = self._retries[each % WINDOW_SECONDS] = 0
        self._second = max(second, self._second)
