"""Serves the dashboard: the page's files at `/ui`, which are static, and its events at `/llamayard/events`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import hdrs, web

from router.api.context import ApiContext
from router.api.dashboard.document import DECISIONS_SHOWN, DocumentBuilder, Facts
from router.api.dashboard.feed import Feed, Page
from router.api.dashboard.files import STATIC_FILES, StaticFiles
from router.api.dashboard.merge_patch import Document
from router.domain.request import Ticket, TicketId
from router.errors import Forbidden, ShuttingDown
from router.http1.headers import UNBUFFERED
from router.llm_api.routes import EVENTS
from router.observability.last_hour import LastHour
from router.observability.request_history import RequestHistory
from router.observability.request_record import RequestRecord

_WRITE_SECONDS_MAX = 15.0
"""A page that does not read for so long is dropped."""


class DashboardHandler:
    """`status` returns the document of `/llamayard/status`. `last_hour`: None if the dashboard is off."""

    def __init__(
        self,
        context: ApiContext,
        status: Callable[[], Mapping[str, Any]],
        history: RequestHistory,
        last_hour: LastHour | None,
    ) -> None:
        self._context = context
        self._status = status
        self._history = history
        self._last_hour = last_hour
        self._builder = DocumentBuilder()
        self._feed = Feed(self._document, lambda: context.controller.is_closing)
        self._wall_offset = datetime.now(UTC).timestamp() - context.controller.now()
        self._files = StaticFiles(STATIC_FILES)

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        """The page, one of its files, or the stream of events, which ends when the router shuts down.

        Raises:
            Forbidden: the dashboard is off.
            NoSuchFile: it has no such file.
            QueueFull: too many pages are open.
            ShuttingDown: the router is draining.
        """
        if self._last_hour is None:
            raise Forbidden("the dashboard is off (dashboard.enabled)")
        if record.route == EVENTS:
            return await self._events(request, record)
        return self._files.response(request, record.response_headers())

    async def _events(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        if self._context.controller.is_closing:
            raise ShuttingDown("the router is shutting down")
        if not self._feed.page_count:
            self._wall_offset = datetime.now(UTC).timestamp() - self._context.controller.now()
        page = self._feed.open()
        try:
            return await _streamed(request, page, record)
        finally:
            self._feed.leave(page)

    async def close(self) -> None:
        await self._feed.close()

    def _document(self) -> Document:
        controller, last_hour = self._context.controller, self._last_hour
        assert last_hour is not None
        status, snapshot = self._status(), controller.snapshot()
        return self._builder.build(
            Facts(
                status=status,
                snapshot=snapshot,
                tickets=self._tickets(),
                running=last_hour.running_requests(),
                steps=self._history.latest_steps(DECISIONS_SHOWN),
                points=last_hour.points,
                spans=last_hour.spans(snapshot.now),
                wall_offset=self._wall_offset,
            )
        )

    def _tickets(self) -> dict[TicketId, Ticket]:
        return {ticket.id: ticket for ticket, _ in self._context.controller.waiting()}


async def _streamed(request: web.BaseRequest, page: Page, record: RequestRecord) -> web.StreamResponse:
    headers = {
        **record.response_headers(),
        hdrs.CONTENT_TYPE: "text/event-stream",
        hdrs.CACHE_CONTROL: "no-store",
        UNBUFFERED[0]: UNBUFFERED[1],
    }
    response = web.StreamResponse(headers=headers)
    try:
        async with asyncio.timeout(_WRITE_SECONDS_MAX):
            await response.prepare(request)
        while events := await page.next():
            async with asyncio.timeout(_WRITE_SECONDS_MAX):
                await response.write(events)
        async with asyncio.timeout(_WRITE_SECONDS_MAX):
            await response.write_eof()
    except TimeoutError:
        page.is_slow = True
    if page.is_slow and request.transport is not None:
        request.transport.abort()
    return response
