"""Debian's Chromium, driven by Playwright, where it is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, Page, async_playwright

from tests.support.waiting import DEADLINE_SECONDS

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Its path. Skips the test without it, but fails in CI."""
    found = next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)
    if found is None:
        hint = "Chromium is not installed (make chromium)"
        pytest.fail(hint) if os.environ.get("CI") else pytest.skip(hint)
    return found


@asynccontextmanager
async def browser() -> AsyncGenerator[Browser]:
    binary = chromium()
    async with async_playwright() as playwright:
        # Its sandbox needs rights that a container lacks, and the page is ours.
        launched = await playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            await launched.close()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[Page]:
    """A page in a fresh profile. What it complains of on its console, other than refused requests, fails the test."""
    complaints: list[str] = []
    async with browser() as launched:
        context = await launched.new_context(**options)
        context.set_default_timeout(DEADLINE_SECONDS * 1000)
        page = await context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        await page.goto(url)
        yield page
        await context.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


async def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page for people who use a keyboard or a screen reader."""
    await page.evaluate(AXE_SCRIPT)
    found = await page.evaluate("axe.run()")
    return [f"{each['id']}: {node['html'][:160]}" for each in found["violations"] for node in each["nodes"]]
