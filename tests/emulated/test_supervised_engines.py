"""Models with a server of their own on the same EMULATED GPUs as Ollama's: memory, evictions, deaths."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import emulated_engine
from tests.support.ollama_server import ROOT
from tests.support.product import Product, prepare
from tests.support.rawhttp import Reply, call
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_BIG = "big:32b"
_PROGRAM = emulated_engine.__name__
_GIB = 2**30
_TAKES = 20 * _GIB
_SMALL = "llama3.1:8b"


def _config(*flags: str, **rules: Any) -> dict[str, Any]:
    command = [
        sys.executable, "-m", _PROGRAM, "--name", "{name}", "--port", "{port}",
        "--bytes", str(_TAKES), *flags,
    ]  # fmt: skip
    engine = {"kind": "vllm", "command": command, "start_timeout_seconds": 60, "env": {"PYTHONPATH": str(ROOT)}}
    model = {"engine": "fast", "path": "/models/big", "memory_bytes_per_gpu": _TAKES, "num_parallel": 8, **rules}
    polls = {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}
    return {"poll": polls, "engines": {"fast": engine}, "models": {_BIG: model}, "log": {"format": "json"}}


@asynccontextmanager
async def _routed(folder: Path, config: dict[str, Any], rig: str = "2x3090") -> AsyncGenerator[Product]:
    product = prepare(folder, config, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", rig))
    try:
        await asyncio.to_thread(product.start)
        yield product
    finally:
        await asyncio.to_thread(product.destroy)


async def _chat(product: Product, model: str = _BIG, **members: Any) -> Reply:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **members}
    return await call(product.address, "POST", "/api/chat", body)


async def _status(product: Product) -> Any:
    return (await call(product.address, "GET", "/llamayard/status")).json()


def _engines(product: Product) -> list[psutil.Process]:
    return [p for p in product.processes() if _PROGRAM in p.cmdline()]


async def _nothing_is_loaded(product: Product) -> bool:
    return (await call(product.address, "GET", "/api/ps")).json()["models"] == []


async def test_the_first_request_starts_the_server_and_an_unload_ends_it(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config("--start-seconds", "1", gpus=[0, 1])) as product:
        assert _engines(product) == []
        first, *others = await asyncio.gather(*(_chat(product) for _ in range(5)))
        pids = {reply.lines()[0]["message"]["content"] for reply in (first, *others)}
        assert len(pids) == 1
        (model,) = (await _status(product))["models"]
        assert (model["name"], model["slots"], model["instance"]) == (_BIG, 8, "big-32b.gpu0+gpu1")
        assert model["per_gpu_bytes"] == [_TAKES, _TAKES]
        (row,) = (await call(product.address, "GET", "/api/ps")).json()["models"]
        assert (row["name"], row["size_vram"]) == (_BIG, 2 * _TAKES)
        reply = await call(product.address, "POST", "/api/generate", {"model": _BIG, "keep_alive": 0})
        assert reply.json()["done_reason"] == "unload"
        await eventually(lambda: not _engines(product))
        await eventually(lambda: _nothing_is_loaded(product))


async def test_it_and_ollamas_models_make_room_for_each_other(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0, 1])) as product:
        assert (await _chat(product, _SMALL)).lines()[-1]["done"] is True
        assert (await _chat(product)).lines()[-1]["done"] is True
        assert [m["name"] for m in (await _status(product))["models"]] == [_BIG]
        (engine,) = [p for p in _engines(product) if p.ppid() == product.process.pid]  # pyright: ignore[reportOptionalMemberAccess]
        large = "qwen2.5:14b"
        assert (await _chat(product, large)).lines()[-1]["done"] is True
        assert [m["name"] for m in (await _status(product))["models"]] == [large]
        assert not engine.is_running()


async def test_a_small_model_that_fits_beside_it_leaves_it_alone(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0]), "2x3090") as product:
        await _chat(product)
        await _chat(product, _SMALL)
        models = {m["name"]: m["instance"] for m in (await _status(product))["models"]}
        assert models == {_BIG: "big-32b.gpu0", _SMALL: "gpu1"}


async def test_without_gpus_of_its_own_it_goes_where_there_is_room(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config()) as product:
        await _chat(product, _SMALL)
        (taken,) = [m["instance"] for m in (await _status(product))["models"]]
        await _chat(product)
        (model,) = [m for m in (await _status(product))["models"] if m["name"] == _BIG]
        assert model["instance"] == f"big-32b.{'gpu1' if taken == 'gpu0' else 'gpu0'}"


async def test_a_server_that_dies_is_started_again_for_the_next_request(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0])) as product:
        await _chat(product)
        for process in _engines(product):
            process.kill()
        reply = await _chat(product)
        assert reply.lines()[-1]["done"] is True


async def test_a_server_that_dies_on_the_first_request_is_never_ready(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config("--dies", gpus=[0])) as product:
        reply = await _chat(product)
        assert (reply.status, "exited with code 3" in reply.body.decode()) == (502, True)
        assert _engines(product) == []


async def test_a_warm_one_is_there_from_the_start_and_stays(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0], keep_warm=True)) as product:
        await eventually(lambda: _engines(product))
        reply = await _chat(product)
        assert reply.lines()[-1]["done"] is True
        assert (await _chat(product, _SMALL)).lines()[-1]["done"] is True
        models = {m["name"]: m["instance"] for m in (await _status(product))["models"]}
        assert models == {_BIG: "big-32b.gpu0", _SMALL: "gpu1"}
        restart = await call(product.address, "POST", "/llamayard/restart", {"instance": "big-32b.gpu0"})
        assert (restart.status, "unload the model" in restart.json()["error"]) == (400, True)


async def test_a_router_that_ends_ends_its_servers(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0])) as product:
        await _chat(product)
        assert _engines(product)
        assert product.process is not None
        product.process.terminate()
        await asyncio.to_thread(product.wait)
        await eventually(lambda: not _engines(product))


async def test_a_server_of_a_killed_router_ends_too(tmp_path: Path) -> None:
    async with _routed(tmp_path, _config(gpus=[0])) as product:
        await _chat(product)
        assert product.process is not None
        product.process.kill()
        await asyncio.to_thread(product.wait)
        await eventually(lambda: not _engines(product))
