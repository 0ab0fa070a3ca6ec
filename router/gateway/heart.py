"""Keeps one client of the aiohttp way waiting: after a silence it sends a head and bytes that its protocol ignores.

What is sent, and to whom, stands in `gateway/waiting.py`. It sends nothing once it was stopped, and a client that is
gone ends it: the handler learns that by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from aiohttp import web

from router.gateway.waiting import Heartbeat


class Heart:
    """Beats inside `async with`, from the first silence until `stop`. Without a heartbeat it does nothing."""

    def __init__(
        self, request: web.BaseRequest, beat: Heartbeat | None, extra: Callable[[], Mapping[str, str]]
    ) -> None:
        self._request = request
        self._extra = extra
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.beat = beat
        self.response: web.StreamResponse | None = None
        """The answer whose head is out; None while nothing was sent."""

    async def __aenter__(self) -> Self:
        if self.beat is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(self.beat))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> web.StreamResponse | None:
        """No more beats; the answer that was begun, if one was."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        return self.response

    async def _run(self, beat: Heartbeat) -> None:
        try:
            while not await self._stops_within(beat.seconds):
                await self._send(beat)
        except ConnectionError:
            return

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    async def _send(self, beat: Heartbeat) -> None:
        if self.response is None:
            response = web.StreamResponse()
            for name, value in (*beat.headers, *self._extra().items()):
                response.headers[name] = value
            await response.prepare(self._request)
            self.response = response
        await self.response.write(beat.piece)
