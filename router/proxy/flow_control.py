"""Pauses reading from a client's connection while at least one reason to do so is set."""

from __future__ import annotations

import asyncio
from enum import IntFlag


class Reason(IntFlag):
    AHEAD = 1
    """The client sent more of later requests than is buffered."""
    AIOHTTP_FULL = 2
    """aiohttp takes no more of the request for now."""
    RESPONSES_UNREAD = 4
    """The client does not read its responses."""
    UPSTREAM_FULL = 8
    """The server takes no more of the request's body for now."""


class FlowControl:
    """One connection's reasons, set on and off."""

    __slots__ = ("_reasons", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._reasons = 0

    @property
    def is_paused(self) -> bool:
        return bool(self._reasons)

    def set(self, reason: Reason, *, on: bool) -> None:
        previous = self._reasons
        self._reasons = previous | reason if on else previous & ~reason
        if bool(previous) == bool(self._reasons) or self._transport.is_closing():
            return
        if previous:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
