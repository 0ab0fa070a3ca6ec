"""Waiting for a condition with a deadline; the only place in the suites that pauses."""

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
"""Never waited for where all is well: long, because a busy machine is no failure."""


async def eventually(
    predicate: Callable[[], Awaitable[T] | T], deadline_seconds: float = DEADLINE_SECONDS, what: str = "the condition"
) -> T:
    """The predicate's first truthy value. AssertionError with the last value once the deadline has passed."""
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
    """The same for fixtures that own no event loop."""
    end, pause = time.monotonic() + deadline_seconds, threading.Event()
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {deadline_seconds} s; last value: {value!r}")
        pause.wait(_PAUSE_SECONDS)
    return value
