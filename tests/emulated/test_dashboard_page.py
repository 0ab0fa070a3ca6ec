"""The dashboard's page in a real browser over the whole program."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from tests.support.browser import opened, violations
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.waiting import DEADLINE_SECONDS

pytestmark = pytest.mark.rig

expect.set_options(timeout=DEADLINE_SECONDS * 1000)

_MODEL = "llama3.1:8b"
_POLLS = {"poll": {"gpu_seconds": 0.2, "residency_seconds": 0.2, "catalog_seconds": 0.2}}
_ONE_SLOT = {"ollama": {"num_parallel": 1}, "models": {_MODEL: {"replicas_max": 1}}}


def _product(folder: Path, speed: float = 20, **config: Any) -> Product:
    return prepare(folder, {**_POLLS, **config}, {"LLAMAYARD_RIG_SPEED": str(speed)}, ("--rig", "3090"))


def _url(product: Product) -> str:
    return f"http://{product.address.host}:{product.address.port}/ui"


def _section(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


@asynccontextmanager
async def _load(product: Product, *users: str) -> AsyncGenerator[None]:
    """Each user asks again and again."""

    async def client(user: str) -> None:
        body = {"model": _MODEL, "prompt": "hello", "options": {"num_predict": 4000}}
        while True:
            await call(product.address, "POST", "/api/generate", body, (("X-OpenWebUI-User-Id", user),))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client(user)) for user in users]
        yield
        for task in tasks:
            task.cancel()


async def test_the_page_shows_what_runs_and_what_waits_and_why(tmp_path: Path) -> None:
    with running(_product(tmp_path, speed=2, **_ONE_SLOT)) as product:
        async with opened(_url(product)) as page:
            await expect(page.get_by_text("EMULATED rig 3090")).to_be_visible()
            await expect(_section(page, "Waiting")).to_contain_text("Nothing waits.")
            async with _load(product, "anna", "ben", "chen"):
                queue, served = _section(page, "Waiting"), _section(page, "Running")
                await expect(queue.locator("tbody tr")).to_have_count(2)
                await expect(served.locator("tbody tr")).to_have_count(1)
                await expect(served.locator("tbody")).to_contain_text("streaming")
                speed = served.locator("tbody tr td").nth(6)
                await expect(speed).to_have_text(re.compile(r"\d"))
                await expect(queue.locator("tbody")).to_contain_text("1 of 1 slots are in use on gpu0")
                await expect(_section(page, "Models").locator("tbody")).to_contain_text(_MODEL)
                await expect(_section(page, "Decisions").locator("tbody")).to_contain_text("loaded")
                assert await violations(page) == []
                await queue.get_by_role("button", name=f"Requests for {_MODEL}").first.click()
                await queue.get_by_role("button", name="Why request").first.click()
                why = page.get_by_role("dialog")
                await expect(why).to_contain_text(re.compile("outcome(waiting|granted)"))  # its turn may have come
                assert await violations(page) == []
                await page.keyboard.press("Escape")
                await expect(why).to_have_count(0)
            await expect(_section(page, "Running")).to_contain_text("Nothing runs.")
            await _section(page, "Decisions").get_by_role("button", name=f"Explain {_MODEL}").first.click()
            explained = page.get_by_role("dialog")
            await expect(explained).to_contain_text("Replicas")
            await expect(explained.locator("tbody")).to_contain_text("gpu0")
            assert await violations(page) == []


async def test_a_command_is_carried_out_only_when_it_is_confirmed(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        async with opened(_url(product)) as page:
            models = _section(page, "Models")
            await models.get_by_role("button", name="Load a model").click()
            dialog = page.get_by_role("dialog")
            await dialog.get_by_label("Model").fill("nope")
            await page.keyboard.press("Enter")
            await expect(dialog.get_by_role("alert")).to_contain_text("model 'nope' not found")
            await dialog.get_by_label("Model").fill(_MODEL)
            await dialog.get_by_role("button", name="Load", exact=True).click()
            await expect(page.get_by_text(f"{_MODEL} is loaded on gpu0.")).to_be_visible()
            unload = models.get_by_role("button", name=f"Unload {_MODEL}")
            await unload.click()
            await expect(dialog).to_contain_text("The next request for it loads it again.")
            assert await violations(page) == []
            await dialog.get_by_role("button", name="Cancel").click()
            await expect(dialog).to_have_count(0)
            assert len(product.call("GET", "/llamayard/status")[1]["models"]) == 1
            await unload.click()
            await dialog.get_by_role("button", name="Unload", exact=True).click()
            await expect(models).to_contain_text("No model is loaded.")
            gpus = _section(page, "GPUs")
            await gpus.get_by_role("button", name="Drain GPU 0").click()
            await dialog.get_by_role("button", name="Drain", exact=True).click()
            await expect(gpus).to_contain_text("drained by an operator")
            assert product.call("GET", "/llamayard/status")[1]["drained"]["gpus"] == [0]
            await gpus.get_by_role("button", name="Resume GPU 0").click()
            await dialog.get_by_role("button", name="Resume", exact=True).click()
            await expect(gpus).not_to_contain_text("drained by an operator")


async def test_a_lost_router_is_said_and_found_again(tmp_path: Path) -> None:
    with running(_product(tmp_path)) as product:
        async with opened(_url(product)) as page:
            await expect(page.get_by_text("live", exact=True)).to_be_visible()
            assert product.process is not None
            product.process.kill()
            product.process.wait()
            banner = page.get_by_role("alert")
            await expect(banner).to_contain_text("Connection lost.")
            await expect(_section(page, "GPUs")).to_contain_text("GPU 0")
            assert await violations(page) == []
            await asyncio.to_thread(product.start)
            await expect(banner).to_have_count(0)
            await expect(page.get_by_text("live", exact=True)).to_be_visible()


def _key(product: Product, *flags: str) -> str:
    command = [sys.executable, "-m", "router", "keys", "create", *flags, "--config", str(product.config)]
    made = subprocess.run(command, env=dict(product.environment), capture_output=True, text=True, check=True)
    return made.stdout.strip()


async def test_the_page_asks_for_a_key_and_keeps_it_to_itself(tmp_path: Path) -> None:
    product = _product(tmp_path)
    admin, user = _key(product, "ops", "--class", "admin"), _key(product, "anna")
    with running(product):
        async with opened(_url(product)) as page:
            urls: list[str] = []
            page.on("request", lambda request: urls.append(request.url))
            field, enter = page.get_by_label("Access key"), page.get_by_role("button", name="Open the dashboard")
            await expect(field).to_be_visible()
            assert await violations(page) == []
            for wrong, words in (("ly-wrong", "not valid"), (user, "has no class 'admin'")):
                await field.fill(wrong)
                await enter.click()
                await expect(page.get_by_role("alert")).to_contain_text(words)
            await field.fill(admin)
            await enter.click()
            await expect(_section(page, "GPUs")).to_be_visible()
            await page.reload()
            await expect(_section(page, "GPUs")).to_be_visible()
            await _section(page, "GPUs").get_by_role("button", name="Drain GPU 0").click()
            await page.get_by_role("dialog").get_by_role("button", name="Drain", exact=True).click()
            await expect(_section(page, "GPUs")).to_contain_text("drained by an operator")
            await page.get_by_role("button", name="Sign out").click()
            await expect(field).to_be_visible()
            await page.reload()
            await expect(field).to_be_visible()
            assert urls and not [url for url in urls if "ly-" in url]
            assert {url.split("/ui")[0].split("/llamayard")[0] for url in urls} == {_url(product).removesuffix("/ui")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_fits_a_phone_in_both_colours(tmp_path: Path, scheme: str) -> None:
    with running(_product(tmp_path)) as product:
        assert product.call("POST", "/llamayard/load", {"model": _MODEL})[0] == 200
        async with opened(
            _url(product), viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
        ) as page:
            await expect(_section(page, "Models")).to_contain_text(_MODEL)
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await page.evaluate(wide) == 0
            assert await violations(page) == []
            ground = "getComputedStyle(document.body).backgroundColor"
            is_dark = sum(map(int, re.findall(r"\d+", await page.evaluate(ground)))) < 3 * 128
            assert is_dark == (scheme == "dark")
            await page.get_by_role("button", name="Colours: auto; change to light").click()
            await page.get_by_role("button", name="Colours: light; change to dark").click()
            await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
            await page.reload()
            await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
