"""Faults of emulated GPUs and servers, as their users meet them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from router.lab.emulator.faults import write_faults
from router.lab.emulator.vram import set_lost
from tests.support import fast_router
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call, connect, request_bytes
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_QUICK_POLLS = {"poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}


def _product(folder: Path, rig: str, **config: Any) -> Product:
    return prepare(folder, {**_QUICK_POLLS, **config}, _FAST, ("--rig", rig))


async def _ask(product: Product, model: str) -> Reply:
    body = {"model": model, "prompt": "hello", "options": {"num_predict": 4}}
    return await call(product.address, "POST", "/api/generate", body)


async def test_a_server_that_cannot_unload_is_restarted_for_who_waits(tmp_path: Path) -> None:
    with running(_product(tmp_path, "2x3090")) as product:
        assert (await _ask(product, "llama3.1:8b")).status == 200
        write_faults(tmp_path / "state" / "rig", [{"unload": "refuse"}])
        reply = await _ask(product, "llama3.3:70b")
        assert (reply.status, reply.lines()[-1]["done"]) == (200, True), reply.body
        metrics = (await call(product.address, "GET", "/metrics")).body.decode()
        assert 'llamayard_unload_failures_total{instance="gpu0",model="llama3.1:8b"} 2.0' in metrics
        assert "restart_instance" in product.log_text()


async def _gives_up(product: Product, model: str, seconds: float) -> bool:
    """Whether a client that sees no byte for so long has left; False if it got an answer."""
    body = {"model": model, "prompt": "hello", "options": {"num_predict": 4}}
    async with connect(product.address) as connection:
        await connection.send(request_bytes("POST", "/api/generate", body))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await connection.head()
                return False
        connection.abort()
    return True


async def test_a_runner_that_hangs_is_replaced_although_every_client_gives_up_early(tmp_path: Path) -> None:
    """At twenty times the speed: a client that leaves after 2 s was patient for 40."""
    product = _product(tmp_path, "3090", stream={"heartbeat_seconds": None})
    product.program = (sys.executable, "-m", fast_router.__name__, "20")
    with running(product):
        assert (await _ask(product, "llama3.1:8b")).status == 200
        write_faults(tmp_path / "state" / "rig", [{"model": "llama3.1:8b", "hang": True}])
        await eventually(lambda: _gives_up(product, "llama3.1:8b", 1.0), what="the fault")
        assert await _gives_up(product, "llama3.1:8b", 1.0)
        assert "its runner died or hangs" not in product.log_text()
        for _ in range(3):
            assert await _gives_up(product, "llama3.1:8b", 2.0)
        await eventually(lambda: "its runner died or hangs" in product.log_text(), what="the unload")
        write_faults(tmp_path / "state" / "rig", [])
        assert (await _ask(product, "llama3.1:8b")).status == 200
        assert product.log_text().count('"event": "loaded"') == 2


async def test_a_lost_gpu_is_told_everywhere_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    rig = tmp_path / "state" / "rig"
    with running(_product(tmp_path, "2x3090")) as product:
        assert (await _ask(product, "llama3.1:8b")).status == 200
        lost = product.call("GET", "/llamayard/status")[1]["gpus"][1]["uuid"]
        set_lost(rig, lost)
        await eventually(lambda: _text(product, "/ready").endswith("GPU 1 is lost: GPU is lost\n"), what="lost")
        assert _text(product, "/ready").startswith("ready: gpu0;")
        row = product.call("GET", "/llamayard/status")[1]["gpus"][1]
        assert (row["lost"], row["memory_free_bytes"], row["available_bytes"]) == (True, None, 0)
        metrics = _text(product, "/metrics")
        assert f'llamayard_gpu_lost{{gpu="{lost}",index="1",' in metrics
        assert f'llamayard_gpu_memory_free_bytes{{gpu="{lost}"' not in metrics
        reply = await _ask(product, "llama3.3:70b")
        assert (reply.status, reply.header("X-Llamayard-Error")) == (503, "no_instance")
        assert int(reply.header("Retry-After") or 0) > 0
        assert "GPU 1 is lost" in reply.json()["error"]
        set_lost(rig, lost, lost=False)
        await eventually(lambda: "lost" not in _text(product, "/ready"), what="the GPU back")
        assert (await _ask(product, "llama3.3:70b")).status == 200


def _text(product: Product, path: str) -> str:
    with urlopen(f"http://{product.address.host}:{product.address.port}{path}", timeout=10) as reply:
        return reply.read().decode()


async def test_requests_that_come_before_the_first_server_is_ready_wait_for_it(tmp_path: Path) -> None:
    product = _product(tmp_path, "3090")
    try:
        product.start(ready=False)
        await eventually(lambda: _answers(product), what="the router listens")
        show = call(product.address, "POST", "/api/show", {"model": "llama3.1:8b"})
        unknown = _ask(product, "nobody-has-it")
        replies = await asyncio.gather(_ask(product, "llama3.1:8b"), show, unknown)
        assert [reply.status for reply in replies] == [200, 200, 404]
    finally:
        product.destroy()


async def test_a_model_whose_servers_are_down_is_never_unknown(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090", stream={"heartbeat_seconds": 300.0})) as product:
        write_faults(tmp_path / "state" / "rig", [{"server": "refuse_start"}])
        for server in product.servers().values():
            server.kill()
        await eventually(lambda: product.call("GET", "/ready")[0] == 503, what="no server")
        show = call(product.address, "POST", "/api/show", {"model": "llama3.1:8b"})
        replies = await asyncio.gather(_ask(product, "llama3.1:8b"), show, call(product.address, "GET", "/api/tags"))
        assert [(reply.status, reply.header("X-Llamayard-Error")) for reply in replies] == [(503, "no_instance")] * 3
        assert all(int(reply.header("Retry-After") or 0) > 0 for reply in replies)


def _missing(product: Product) -> list[dict[str, str]]:
    return product.call("GET", "/llamayard/status")[1]["warm_missing"]


def _answers(product: Product) -> bool:
    with contextlib.suppress(OSError):
        return product.call("GET", "/health")[0] == 200
    return False


async def test_warm_models_that_do_not_fit_are_told(tmp_path: Path) -> None:
    models = {name: {"keep_warm": True} for name in ("qwen2.5-coder:32b", "deepseek-r1:32b", "gemma2:27b")}
    with running(_product(tmp_path, "2x3090", models=models)) as product:
        await eventually(lambda: "warm_model_missing" in product.log_text(), what="the warning")
        await eventually(lambda: len(_missing(product)) == 1, what="two warm models")
        (missing,) = _missing(product)
        assert "fits nowhere" in missing["reason"]
        model = missing["model"]
        assert f'llamayard_warm_models_missing{{model="{model}"}} 1.0' in _text(product, "/metrics")
        loaded = {row["name"] for row in product.call("GET", "/llamayard/status")[1]["models"]}
        assert loaded == set(models) - {model}
