"""Virtual time: a heap of what is due, and a clock that jumps from one to the next.

What is due at the same time happens in the order in which it was asked for, so that a run is the same each time. It
knows nothing of servers, GPUs or requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """Something due; `cancel` makes it never happen."""

    __slots__ = ("_call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> bool:
        """Does it; False where it was cancelled."""
        call, self._call = self._call, None
        if call is None:
            return False
        call()
        return True


class Timeline:
    """The clock of one run, in seconds since its start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._asked = 0

    def at(self, due: float, call: Callable[[], None]) -> Timer:
        """Calls at that time, or now if it has passed."""
        timer = Timer(max(due, self.now), call)
        self._asked += 1
        heapq.heappush(self._heap, (timer.due, self._asked, timer))
        return timer

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.at(self.now + seconds, call)

    def step(self) -> bool:
        """Does the next thing that is due; False when nothing is left."""
        while self._heap:
            due, _, timer = heapq.heappop(self._heap)
            self.now = max(self.now, due)
            if timer.fire():
                return True
        return False
