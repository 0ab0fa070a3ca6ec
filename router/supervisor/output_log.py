"""The last lines that the servers have written, over their restarts: bounded, and numbered across all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

LINES_MAX = 500
"""Of each instance."""
_BYTES_MAX = 262_144
"""Of each instance, counted in characters."""
_INSTANCES_MAX = 64
"""Instances on demand come and go: of more than these, those that were silent for longest are forgotten."""


class OutputLine(NamedTuple):
    number: int
    """Counts up over all instances."""
    instance: str
    text: str


class OutputLog:
    """Written by the instances, read by whoever shows their output."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[OutputLine]] = {}
        self._sizes: dict[str, int] = {}
        self._number = 0
        self._grown = asyncio.Event()

    def append(self, instance: str, text: str) -> None:
        self._number += 1
        lines = self._lines.pop(instance, deque[OutputLine]())
        self._lines[instance] = lines  # the last to write comes last
        lines.append(OutputLine(self._number, instance, text))
        self._sizes[instance] = self._sizes.get(instance, 0) + len(text)
        while len(lines) > LINES_MAX or (len(lines) > 1 and self._sizes[instance] > _BYTES_MAX):
            self._sizes[instance] -= len(lines.popleft().text)
        if len(self._lines) > _INSTANCES_MAX:
            silent = next(iter(self._lines))
            del self._lines[silent], self._sizes[silent]
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    @property
    def instances(self) -> tuple[str, ...]:
        """Those that have lines here, also after their end."""
        return tuple(self._lines)

    def after(self, number: int, instance: str | None = None) -> list[OutputLine]:
        """The lines with a higher number, of one instance or all, in order."""
        logs = self._lines.values() if instance is None else (self._lines.get(instance, deque[OutputLine]()),)
        return sorted(line for lines in logs for line in lines if line.number > number)

    async def grown(self) -> None:
        """Waits, without a deadline, for the next line."""
        await self._grown.wait()
