"""Drains, resumes and rolling restarts of a running router, by its commands and by its API."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import ROOT
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_QUICK_POLLS = {"poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}
_MODEL = "llama3.1:8b"


def _product(folder: Path, rig: str, **config: Any) -> Product:
    return prepare(folder, {**_QUICK_POLLS, **config}, _FAST, ("--rig", rig))


async def _ask(product: Product, model: str = _MODEL, tokens: int = 4) -> Reply:
    body = {"model": model, "prompt": "hello", "options": {"num_predict": tokens}}
    return await call(product.address, "POST", "/api/generate", body)


def _command(product: Product, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "router", *words, "--config", str(product.config)]
    return subprocess.run(
        command, env=dict(product.environment), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def _status(product: Product) -> dict[str, Any]:
    return product.call("GET", "/llamayard/status")[1]


async def test_a_gpu_is_drained_shown_and_resumed(tmp_path: Path) -> None:
    with running(_product(tmp_path, "2x3090")) as product:
        assert (await _ask(product)).status == 200
        drained = _command(product, "drain", "gpu", "0")
        assert (drained.returncode, drained.stdout) == (0, "drained: GPU 0\n"), drained.stderr
        await eventually(lambda: all(m["instance"] != "gpu0" for m in _status(product)["models"]), what="unloaded")
        status = _status(product)
        assert [gpu["drained"] for gpu in status["gpus"]] == [True, False]
        assert {row["name"]: row["state"] for row in status["instances"]}["gpu0"] == "draining"
        reply = await _ask(product)
        assert reply.status == 200
        assert {model["instance"] for model in _status(product)["models"]} == {"gpu1"}
        refused = await _ask(product, "llama3.3:70b")
        assert (refused.status, refused.header("X-Llamayard-Error")) == (503, "no_instance")
        assert "GPU 0 is drained" in refused.json()["error"]
        metrics = (await call(product.address, "GET", "/metrics")).body.decode()
        assert 'llamayard_gpu_drained{gpu="' in metrics
        assert "GPU 0" in _command(product, "drain", "instance", "spread").stdout
        assert _command(product, "resume", "all").stdout == "nothing is drained: everything is in service\n"
        assert (await _ask(product, "llama3.3:70b")).status == 200
        assert '"drained"' in product.log_text()


async def test_when_all_is_drained_the_router_is_not_ready_and_says_why(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as product:
        assert product.call("POST", "/llamayard/drain", {"all": True})[1]["drained"]["all"] is True
        assert product.call("GET", "/ready")[0] == 503
        refused = await _ask(product)
        assert (refused.status, refused.header("X-Llamayard-Error")) == (503, "no_instance")
        assert "drained by an operator" in refused.json()["error"]
        assert product.call("POST", "/llamayard/resume", {"gpu": 0})[0] == 400
        assert product.call("POST", "/llamayard/resume", {"all": True})[0] == 200
        assert (await _ask(product)).status == 200


async def test_commands_that_name_nothing_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with running(_product(tmp_path, "3090")) as product:
        for body, words in (
            ({}, "does not say what"),
            ({"gpu": "9" * 5000}, "is no GPU of this machine"),
            ({"gpu": 7}, "'7' is no GPU of this machine; there are: 0 ("),
            ({"instance": "nope"}, "there is no instance 'nope'; there are: gpu0"),
            ({"gpu": 0, "all": True}, "more than one of"),
            ({"cpu": 0}, "unknown field `cpu`"),
            ({"instance": [1]}, "instance"),
        ):
            status, answer = product.call("POST", "/llamayard/drain", body)
            assert (status, words in answer["error"]) == (400, True), answer
        status, answer = product.call("POST", "/llamayard/restart", {"gpu": 0})
        assert (status, "instances are restarted" in answer["error"]) == (400, True)
        refused = _command(product, "drain", "gpu", "9")
        assert (refused.returncode, "is no GPU" in refused.stderr) == (1, True)
        foreign = await call(
            product.address, "POST", "/llamayard/drain", {"all": True}, headers=(("Origin", "http://evil.example"),)
        )
        assert foreign.status == 403
        assert product.call("GET", "/ready")[0] == 200


async def test_a_rolling_restart_under_load_fails_no_request(tmp_path: Path) -> None:
    with running(_product(tmp_path, "2x3090", models={_MODEL: {"replicas_max": 2}})) as product:
        replies: list[Reply] = []
        before = {process.pid for process in product.servers().values()}
        done = asyncio.Event()

        async def client() -> None:
            while not done.is_set():
                replies.append(await _ask(product, tokens=64))

        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(client())
            await eventually(lambda: len(replies) > 6, what="load")
            restarted = await asyncio.to_thread(_command, product, "restart")
            assert "restarting one after the other: gpu0, gpu1" in restarted.stdout, restarted.stderr
            await eventually(lambda: "restart_finished" in product.log_text(), what="the end of the restart")
            done.set()
        assert {reply.status for reply in replies} == {200}
        assert all(reply.lines()[-1]["done"] for reply in replies)
        assert not before & {process.pid for process in product.servers().values()}
        assert _status(product)["restart"] is None
