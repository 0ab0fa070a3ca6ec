"""Faults of emulated GPUs and servers, as their users meet them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router.lab.emulator.faults import write_faults
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call

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
