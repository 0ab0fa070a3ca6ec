"""Why a client's connection is not read for now: any of several reasons pauses it, the end of the last resumes it."""

from __future__ import annotations

import asyncio
from enum import IntFlag


class Reason(IntFlag):
    AHEAD = 1
    """It sent more of later requests than is kept."""
    LIBRARY = 2
    """The HTTP library takes no more of the request for now."""
    UNTAKEN = 4
    """It does not take its answers."""
    BLOCKED = 8
    """The server takes no more of the request's body for now."""


class FlowControl:
    """`set` reasons on and off."""

    __slots__ = ("_reasons", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._reasons = 0

    def set(self, reason: Reason, *, on: bool) -> None:
        before = self._reasons
        self._reasons = before | reason if on else before & ~reason
        if bool(before) == bool(self._reasons) or self._transport.is_closing():
            return
        if before:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
