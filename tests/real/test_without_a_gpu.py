"""A server that has lost its GPU, such as after a driver update: its models run on the CPU, and it reports no size."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from tests.support.ollama_server import ModelFile, OllamaServer, create_from_file, real_server
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.waiting import eventually

pytestmark = [pytest.mark.ollama, pytest.mark.rig]

_ASKED = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}


@pytest.fixture(scope="module")
def blind(files: Mapping[str, ModelFile], tmp_path_factory: pytest.TempPathFactory) -> Generator[OllamaServer]:
    """A real, current server on a machine without GPUs."""
    with real_server(tmp_path_factory.mktemp("blind")) as server:
        create_from_file(server, "tiny", files["tiny"].path, files["tiny"].digest)
        yield server


@pytest.fixture
def product(blind: OllamaServer, tmp_path: Path) -> Generator[Product]:
    """A router that takes the server for one with an (EMULATED) GPU."""
    config = {
        "instances": [{"name": "blind", "url": blind.url, "gpus": [0]}],
        "placement": {"on_demand": False},
        "poll": {"residency_seconds": 0.2},
        "log": {"format": "json"},
    }
    with running(prepare(tmp_path, config, arguments=("--rig", "3090"))) as router:
        yield router


async def test_a_load_that_comes_out_on_the_cpu_is_a_spill(product: Product) -> None:
    reply = await call(product.address, "POST", "/api/generate", _ASKED)
    assert (reply.status, reply.header("X-Llamayard-Error")) == (502, "load_failed"), reply.body
    assert "100 % on the CPU on blind" in reply.json()["error"]
    assert "load_spilled" in product.log_text()
    outcomes = (await call(product.address, "GET", "/metrics")).body.decode()
    assert 'llamayard_loads_total{instance="blind",model="tiny:latest",outcome="spilled"} 2.0' in outcomes


async def test_a_model_found_on_the_cpu_is_told(product: Product, blind: OllamaServer) -> None:
    assert blind.call("POST", "/api/generate", {"model": "tiny"})[0] == 200
    await eventually(lambda: "model_on_cpu" in product.log_text(), what="the warning")
    (row,) = product.call("GET", "/llamayard/status")[1]["models"]
    assert (row["name"], row["cpu_ratio"], row["per_gpu_bytes"]) == ("tiny:latest", 1.0, [0])
