"""A clock that tests can replace, and running work until an event is set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Returns seconds on a monotonic clock."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The system's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def run_unless_set(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of `work`, or None if `event` is set first: `work` is then cancelled and its cleanup awaited.

    If both happen at once, the result is returned.
    """
    async with asyncio.TaskGroup() as group:
        work_task = group.create_task(work)
        event_task = group.create_task(event.wait())
        await asyncio.wait({work_task, event_task}, return_when=asyncio.FIRST_COMPLETED)
        work_task.cancel()
        event_task.cancel()
    return None if work_task.cancelled() else work_task.result()
