"""Models that a server does not describe: no weights in the Modelfile, as with safetensors, or run on ollama.com."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.product import Product, prepare
from tests.support.rawhttp import Reply, call
from tests.support.scripted_server import Scripted, scripted
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_ODD = {"name": "odd:latest", "model": "odd:latest", "digest": "d1", "size": 9_000_000_000}
_CLOUD = {"name": "big:cloud", "model": "big:cloud", "digest": "d2", "size": 300, "remote_host": "https://ollama.com"}


class _Server:
    """A server with both models. It answers while `gate` is set, and notes how many questions came at once."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, Any]] = []
        self.running = self.running_max = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def answers(self) -> dict[str, Any]:
        return {
            "/api/version": {"version": "0.34.0"},
            "/api/tags": {"models": [_ODD, _CLOUD]},
            "/api/show": {"modelfile": "FROM odd:latest", "model_info": {}, "capabilities": ["completion"]},
            "/api/ps": lambda _: web.json_response({"models": self.loaded}),
            "/api/generate": self.generate,
        }

    async def generate(self, body: Any) -> web.Response:
        if body["model"].startswith("odd"):
            self.loaded = [{**_ODD, "size_vram": _ODD["size"], "context_length": 8192}]
        if not body.get("prompt"):
            return web.json_response({"model": body["model"], "done": True, "done_reason": "load"})
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        await self.gate.wait()
        self.running -= 1
        return web.json_response({"model": body["model"], "response": "x", "done": True, "done_reason": "stop"})


@asynccontextmanager
async def _stage(folder: Path) -> AsyncGenerator[tuple[Product, Scripted, _Server]]:
    server = _Server()
    async with scripted(server.answers()) as script:
        config = {
            "instances": [{"name": "far", "url": script.url, "gpus": [0], "num_parallel": 1}],
            "placement": {"on_demand": False},
            "ollama": {"cloud": True},
            "poll": {"catalog_seconds": 3600.0, "residency_seconds": 0.2},
        }
        product = prepare(folder, config, arguments=("--rig", "3090"))
        try:
            await asyncio.to_thread(product.start)
            yield product, script, server
        finally:
            await asyncio.to_thread(product.destroy)


async def _ask(product: Product, model: str) -> Reply:
    return await call(product.address, "POST", "/api/generate", {"model": model, "prompt": "hi", "stream": False})


async def _waiting(product: Product, count: int) -> bool:
    return (await call(product.address, "GET", "/llamayard/status")).json()["queue"]["waiting"] == count


async def test_a_model_in_an_unknown_format_has_slots_and_memory_and_is_looked_up_once(tmp_path: Path) -> None:
    async with _stage(tmp_path) as (product, script, server):
        first = await _ask(product, "odd")
        assert (first.status, first.header("X-Llamayard-Instance")) == (200, "far"), first.body
        lookups = script.paths().count("/api/tags"), script.paths().count("/api/show")
        server.gate.clear()
        asked = asyncio.gather(*(_ask(product, "odd") for _ in range(4)))
        await eventually(lambda: _waiting(product, 3), what="three requests that wait for the slot")
        server.gate.set()
        replies = await asked
        assert [reply.status for reply in replies] == [200] * 4
        polls = script.paths().count("/api/ps")
        await eventually(lambda: script.paths().count("/api/ps") > polls + 2, what="polls while it is loaded")
        assert (script.paths().count("/api/tags"), script.paths().count("/api/show")) == lookups
        assert server.running_max == 1
        _, status = await asyncio.to_thread(product.call, "GET", "/llamayard/status")
        (row,) = status["models"]
        assert (row["name"], row["slots"], row["size_vram_bytes"]) == ("odd:latest", 1, 9_000_000_000)
        assert row["per_gpu_bytes"][0] >= 9_000_000_000
        assert product.log_text().count("model_format_unknown") == 1


async def test_a_cloud_model_passes_without_being_looked_up_each_time(tmp_path: Path) -> None:
    async with _stage(tmp_path) as (product, script, _):
        assert (await _ask(product, "big:cloud")).status == 200
        asked = len(script.requests) - script.paths().count("/api/ps") - script.paths().count("/api/version")
        for _ in range(3):
            assert (await _ask(product, "big:cloud")).status == 200
        now = len(script.requests) - script.paths().count("/api/ps") - script.paths().count("/api/version")
        assert now - asked == 3
