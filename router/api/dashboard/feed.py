"""One stream of events for all open pages: a document, then every second what has changed in it.

The document is built once a second for all pages together, and only while one is open. A page that does not read in
time is dropped, and so is a stream that is `STREAM_SECONDS_MAX` old: its page comes back by itself, and shows its key
again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from router.api.dashboard.merge_patch import Document, merge_patch
from router.errors import QueueFull

PAGES_MAX = 16
STREAM_SECONDS_MAX = 120
"""So many updates, rather: one is sent each second."""
PERIOD_SECONDS = 1.0
_BACKLOG_MAX = 10
"""Updates that a page may be behind."""


class Page:
    """One reader of the stream."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._count = 0
        self.is_over = False
        """Whether nothing more will come."""
        self.is_slow = False

    def put(self, event: bytes) -> None:
        if self.is_over:
            return
        self._count += 1
        if len(self._events) >= _BACKLOG_MAX:
            self.is_slow = True
            self.end()
            return
        self._events.append(event)
        self._changed.set()
        if self._count > STREAM_SECONDS_MAX:
            self.end()

    def end(self) -> None:
        self.is_over = True
        self._changed.set()

    async def next(self) -> bytes:
        """The events to send now; b"" once there are none any more."""
        await self._changed.wait()
        if self.is_slow:
            return b""
        events = b"".join(self._events)
        self._events.clear()
        if not self.is_over:
            self._changed.clear()
        return events


class Feed:
    """`build` makes the document of now; it has a member `at`, the time, which is sent with every patch."""

    def __init__(self, build: Callable[[], Document], is_closing: Callable[[], bool]) -> None:
        self._build = build
        self._is_closing = is_closing
        self._pages: set[Page] = set()
        self._document: Document = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def page_count(self) -> int:
        return len(self._pages)

    def open(self) -> Page:
        """A new page, whose first event is the whole document.

        Raises:
            QueueFull: there are `PAGES_MAX` pages.
        """
        if len(self._pages) >= PAGES_MAX:
            raise QueueFull(f"{PAGES_MAX} pages of the dashboard are open; close one", retry_after_seconds=5)
        if not self._pages:
            self._document = self._build()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        page = Page()
        page.put(_event("document", self._document))
        self._pages.add(page)
        return page

    def leave(self, page: Page) -> None:
        """The page is closed."""
        page.end()
        self._pages.discard(page)

    def update(self) -> None:
        """Sends what has changed to all pages."""
        document, before = self._build(), self._document
        self._document = document
        event = _event("patch", {**merge_patch(before, document), "at": document["at"]})
        for page in self._pages:
            page.put(event)
        self._pages = {page for page in self._pages if not page.is_over}

    async def close(self) -> None:
        """Ends all pages."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._pages and not self._is_closing():
                await asyncio.sleep(PERIOD_SECONDS)
                if self._pages:
                    self.update()
        except Exception:  # the outermost edge of a task: pages must not wait for ever
            structlog.get_logger("router.api").exception("dashboard_crashed")
        finally:
            self._task = None
            for page in self._pages:
                page.end()
            self._pages = set()


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
