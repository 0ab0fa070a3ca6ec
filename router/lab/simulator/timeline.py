"""Virtual clock: a heap of timers, and a time that jumps from one timer to the next.

Timers due at the same time fire in the order in which they were set, so a run is deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """A pending callback; `cancel` prevents it."""

    __slots__ = ("_call", "due")

    def __init__(self, due: float, call: Callable[[], object]) -> None:
        self.due = due
        self._call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> bool:
        """Calls the callback. Returns False if the timer was cancelled."""
        call, self._call = self._call, None
        if call is None:
            return False
        call()
        return True


class Timeline:
    """The virtual clock of one run, in seconds since its start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._timer_count = 0

    def at(self, due: float, call: Callable[[], object]) -> Timer:
        """Sets a timer for that time, or for now if it has passed."""
        timer = Timer(max(due, self.now), call)
        self._timer_count += 1
        heapq.heappush(self._heap, (timer.due, self._timer_count, timer))
        return timer

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        return self.at(self.now + seconds, call)

    def step(self) -> bool:
        """Advances to the next timer and fires it. Returns False if no timer is left."""
        while self._heap:
            due, _, timer = heapq.heappop(self._heap)
            self.now = max(self.now, due)
            if timer.fire():
                return True
        return False
