"""Draws the pictures of the dashboard in docs/images: `make screenshots`.

The router runs over two EMULATED GPUs while a small team of clients asks for more models than fit; after a while the
page is opened in Chromium and photographed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from playwright.async_api import async_playwright

IMAGES = Path(__file__).parents[2] / "docs/images"
_RIG = "2x3090"
_MODELS = ("qwen3:8b", "gemma3:27b", "qwen3:32b", "llama3.1:8b", "qwen2.5-coder:32b")
_USERS = ("anna", "ben", "chen", "dora", "emil", "open-webui", "ci-bot")
_CLIENTS = 14
_COLOURS = 160
_SHOTS: dict[str, dict[str, Any]] = {
    "dashboard.png": {"viewport": {"width": 1440, "height": 1100}, "color_scheme": "light"},
    "dashboard-dark.png": {"viewport": {"width": 1440, "height": 1100}, "color_scheme": "dark"},
    "dashboard-phone.png": {"viewport": {"width": 390, "height": 780}, "color_scheme": "light"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long the clients ask before the pictures")
    asyncio.run(_draw(parser.parse_args(arguments).seconds))
    return 0


async def _draw(seconds: float) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "router", "serve", "--rig", _RIG, "--port", str(port)]
        state = f"state_directory={folder}"
        router = await asyncio.create_subprocess_exec(*command, "--set", state, stderr=subprocess.DEVNULL)
        try:
            await _with_clients(f"http://127.0.0.1:{port}", seconds)
        finally:
            router.terminate()
            await router.wait()


async def _with_clients(url: str, seconds: float) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await _until_ready(session, url)
        clients = [asyncio.ensure_future(_client(session, url, number)) for number in range(_CLIENTS)]
        await asyncio.sleep(seconds)
        await _photograph(url)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _until_ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with session.get(f"{url}/ready") as reply:
                if reply.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)


async def _client(session: aiohttp.ClientSession, url: str, number: int) -> None:
    draw = random.Random(number)
    headers = {"X-OpenWebUI-User-Id": _USERS[number % len(_USERS)]}
    while True:
        model = draw.choice(_MODELS) if draw.random() < 0.35 else _MODELS[number % len(_MODELS)]
        prompt, tokens = "hello " * draw.randint(20, 400), draw.randint(60, 500)
        body = {"model": model, "prompt": prompt, "options": {"num_predict": tokens}}
        async with session.post(f"{url}/api/generate", json=body, headers=headers) as reply:
            async for _ in reply.content:
                pass
        await asyncio.sleep(2 * draw.random())


async def _photograph(url: str) -> None:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        for name, options in _SHOTS.items():
            page = await browser.new_page(**options)
            await page.goto(f"{url}/ui")
            await page.wait_for_selector("#running tbody tr")
            await page.wait_for_timeout(5000)  # so that streams have their speeds
            image = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
            flat = image.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            flat.save(IMAGES / name, optimize=True)
            await page.close()
        await browser.close()


if __name__ == "__main__":
    sys.exit(main())
