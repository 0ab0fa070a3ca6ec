"""Waits for a condition with a deadline; the only place in the tests that sleeps."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

T = TypeVar("T")

_PAUSE_SECONDS = 0.02
DEADLINE_SECONDS = 60.0
"""Only reached on failure; long, because a busy machine is not a failure."""


async def eventually(
    predicate: Callable[[], Awaitable[T] | T], deadline_seconds: float = DEADLINE_SECONDS, what: str = "the condition"
) -> T:
    """Returns the predicate's first truthy value; AssertionError with the last value after the deadline."""
    end = time.monotonic() + deadline_seconds
    while True:
        answer = predicate()
        value = cast("T", await answer if inspect.isawaitable(answer) else answer)
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {deadline_seconds} s; last value: {value!r}")
        await asyncio.sleep(_PAUSE_SECONDS)


def eventually_sync(
    predicate: Callable[[], T], deadline_seconds: float = DEADLINE_SECONDS, what: str = "the condition"
) -> T:
    """Same as `eventually`, for code without an event loop."""
    end, pause = time.monotonic() + deadline_seconds, threading.Event()
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {deadline_seconds} s; last value: {value!r}")
        pause.wait(_PAUSE_SECONDS)
    return value
