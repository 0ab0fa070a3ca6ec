"""One document a second for all pages, and no page that holds up another."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.api.dashboard.feed import PAGES_MAX, STREAM_SECONDS_MAX, Feed, Page
from router.errors import QueueFull


class _Source:
    """A document that changes whenever it is built."""

    def __init__(self) -> None:
        self.built = 0
        self.is_closing = False

    def __call__(self) -> dict[str, Any]:
        self.built += 1
        return {"at": self.built, "models": {"a": {"in_flight": self.built % 2}}}


@asynccontextmanager
async def _feed(source: _Source) -> AsyncGenerator[Feed]:
    feed = Feed(source, lambda: source.is_closing)
    try:
        yield feed
    finally:
        await feed.close()


async def _events(page: Page) -> list[tuple[str, Any]]:
    parts = (await page.next()).decode().split("\n\n")[:-1]
    lines = [part.split("\n") for part in parts]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


async def test_a_page_gets_the_document_and_then_what_changes() -> None:
    source = _Source()
    async with _feed(source) as feed:
        page = feed.open()
        assert await _events(page) == [("document", {"at": 1, "models": {"a": {"in_flight": 1}}})]
        feed.update()
        assert await _events(page) == [("patch", {"at": 2, "models": {"a": {"in_flight": 0}}})]


async def test_all_pages_share_one_document() -> None:
    source = _Source()
    async with _feed(source) as feed:
        pages = [feed.open() for _ in range(PAGES_MAX)]
        feed.update()
        assert source.built == 2
        assert {tuple(name for name, _ in await _events(page)) for page in pages} == {("document", "patch")}
        with pytest.raises(QueueFull, match="16 pages"):
            feed.open()
        feed.leave(pages[0])
        feed.open()


async def test_a_later_page_gets_the_document_that_the_patches_have_reached() -> None:
    source = _Source()
    async with _feed(source) as feed:
        feed.open()
        feed.update()
        assert await _events(feed.open()) == [("document", {"at": 2, "models": {"a": {"in_flight": 0}}})]


async def test_a_page_that_does_not_read_is_dropped_and_the_others_are_not() -> None:
    async with _feed(_Source()) as feed:
        slow, quick = feed.open(), feed.open()
        while not slow.is_over:
            feed.update()
            assert await _events(quick)
        assert slow.is_slow
        assert await slow.next() == b""
        assert feed.page_count == 1


async def test_a_stream_ends_after_a_while_with_its_last_events() -> None:
    async with _feed(_Source()) as feed:
        page = feed.open()
        seen = 0
        while events := await _events(page):
            seen += len(events)
            feed.update()
        assert seen == STREAM_SECONDS_MAX + 1
        assert not page.is_slow
        assert feed.page_count == 0


async def test_pages_end_when_the_router_closes() -> None:
    source = _Source()
    async with _feed(source) as feed:
        page = feed.open()
        assert await page.next()
        source.is_closing = True
        while await page.next():
            pass
        assert feed.page_count == 0
        assert source.built <= 2


async def test_nothing_is_built_without_a_page() -> None:
    source = _Source()
    async with _feed(source) as feed:
        assert source.built == 0
        feed.leave(feed.open())
        assert (source.built, feed.page_count) == (1, 0)
