"""The clock that waiting is done by, so that tests of waits need not wait; and waiting for the first of two things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result, or None once the event is set: the work is then cancelled, and its cleaning up awaited.

    Work that is done when the event is set counts as done.
    """
    async with asyncio.TaskGroup() as group:
        working = group.create_task(work)
        waiting = group.create_task(event.wait())
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        waiting.cancel()
    return None if working.cancelled() else working.result()
