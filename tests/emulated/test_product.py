"""The whole program over emulated GPUs and emulated servers: `serve --rig 2x3090`.

Models are sparse files put into the store that its servers share; what is loaded where is asked of the servers.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from router.lab.emulator.faults import write_faults
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call, connect, request_bytes
from tests.support.sparse_model import LLAMA_8B, LLAMA_70B, LLAMA_405B, put_into_store
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.rig

_FAST = {"LLAMAYARD_RIG_SPEED": "20"}
_SPECS = {"small-a": LLAMA_8B, "small-b": LLAMA_8B, "seventy": LLAMA_70B, "huge": LLAMA_405B}


def _make(folder: Path) -> Product:
    config = {"log": {"format": "json"}, "poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}
    return prepare(folder, config, _FAST, ("--rig", "2x3090"))


def _furnish(product: Product) -> None:
    (store,) = {process.environ()["OLLAMA_MODELS"] for process in product.servers().values()}
    for name, spec in _SPECS.items():
        put_into_store(Path(store), name, spec)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    with running(_make(tmp_path_factory.mktemp("rig"))) as router:
        _furnish(router)
        yield router


async def _ask(product: Product, model: str, **fields: Any) -> Reply:
    body = {"model": model, "prompt": "hello", "options": {"num_predict": 4}, **fields}
    return await call(product.address, "POST", "/api/generate", body)


def _gpus_of(product: Product, model: str) -> list[int]:
    """How many GPUs each server sees that holds the model."""
    servers = product.servers()
    holding = [port for port, names in product.resident().items() if f"{model}:latest" in names]
    return [len(servers[port].environ()["CUDA_VISIBLE_DEVICES"].split(",")) for port in holding]


async def _unload_all(product: Product) -> None:
    for name in _SPECS:
        await call(product.address, "POST", "/api/generate", {"model": name, "keep_alive": 0})
    await eventually(lambda: not any(product.resident().values()), what="nothing loaded")


async def test_there_is_one_server_a_gpu_and_one_over_all(product: Product) -> None:
    seen = [process.environ()["CUDA_VISIBLE_DEVICES"].split(",") for process in product.servers().values()]
    assert sorted(map(len, seen)) == [1, 1, 2]
    (spread,) = [gpus for gpus in seen if len(gpus) == 2]
    assert sorted(gpus[0] for gpus in seen if len(gpus) == 1) == sorted(spread)
    assert all(gpu.startswith("GPU-") for gpu in spread)


async def test_small_models_go_to_single_gpus(product: Product) -> None:
    await _unload_all(product)
    for name in ("small-a", "small-b"):
        reply = await _ask(product, name)
        assert (reply.status, reply.end, reply.lines()[-1]["done"]) == (200, "complete", True)
        assert _gpus_of(product, name) == [1]


async def test_a_70b_goes_over_both_gpus_and_wholly_onto_them(product: Product) -> None:
    await _unload_all(product)
    reply = await _ask(product, "seventy", options={"num_predict": 4, "num_ctx": 2048})
    assert (reply.status, reply.lines()[-1]["done"]) == (200, True), reply.body
    assert _gpus_of(product, "seventy") == [2]
    (entry,) = [m for m in product.call("GET", "/api/ps")[1]["models"] if m["name"] == "seventy:latest"]
    assert entry["size_vram"] == entry["size"] > 40_000_000_000


async def test_a_70b_with_nothing_configured_is_served_on_two_3090(product: Product) -> None:
    """With the default cache two slots do not fit: one does."""
    await _unload_all(product)
    reply = await _ask(product, "seventy")
    assert (reply.status, reply.lines()[-1]["done"]) == (200, True), reply.body
    assert _gpus_of(product, "seventy") == [2]


async def test_a_small_model_makes_room_for_itself_when_a_large_one_is_idle(product: Product) -> None:
    await _unload_all(product)
    assert (await _ask(product, "seventy", options={"num_predict": 4, "num_ctx": 2048})).status == 200
    assert (await _ask(product, "small-a")).status == 200
    assert _gpus_of(product, "small-a") == [1]


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
async def test_a_model_that_fits_nowhere_is_refused_with_the_bytes(product: Product, path: str) -> None:
    reply = await call(product.address, "POST", path, {"model": "huge", "prompt": "hello"})
    assert reply.status == 422
    error = reply.json()["error"]
    words = error if path.startswith("/api") else error["message"]
    assert "huge" in words
    assert len(re.findall(r"\d+(?:\.\d+)? ?(?:[KMGT]i?)?B|\d{9,}", words)) >= 2, words  # needed, and there are
    assert _gpus_of(product, "huge") == []


async def test_everything_says_that_it_is_emulated(product: Product) -> None:
    status = product.call("GET", "/llamayard/status")[1]
    assert "emulated" in json.dumps(status).lower()
    assert "emulated" in product.log_text().lower()


async def test_status_shows_the_gpus(product: Product) -> None:
    status = product.call("GET", "/llamayard/status")[1]
    assert "3090" in json.dumps(status)
    names = {instance["name"] for instance in status["instances"]}
    assert names >= {"gpu0", "gpu1", "spread"}
    assert all(name.startswith("gpu") for name in names - {"spread"})


async def test_a_copy_that_has_lost_its_slot_is_loaded_anew(tmp_path: Path) -> None:
    config = {"stream": {"first_byte_timeout_seconds": 2.0}, "ollama": {"num_parallel": 1}}
    product = prepare(tmp_path, config, _FAST, ("--rig", "h100"))
    with running(product):
        _furnish(product)
        write_faults(tmp_path / "state" / "rig", [{"lose_slot": True}])
        text = " ".join(map(str, range(20_000)))  # longer than any test, and without repetitions that would end it
        async with connect(product.address) as leaving:
            long = {"model": "small-a", "prompt": "x", "format": {"const": text}}
            await leaving.send(request_bytes("POST", "/api/generate", long))
            await leaving.head()
            assert await leaving.chunk()
            leaving.abort()
        late = await _ask(product, "small-a", stream=False)
        assert (late.status, late.header("X-Llamayard-Error")) == (504, "wait_timeout")
        write_faults(tmp_path / "state" / "rig", [])

        async def is_served() -> bool:
            return (await _ask(product, "small-a", stream=False)).status == 200

        await eventually(is_served, what="a served request")


def test_nothing_is_left_after_sigterm(tmp_path: Path) -> None:
    with running(_make(tmp_path)) as router:
        assert len(router.servers()) == 3
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
        eventually_sync(lambda: not router.processes(), what="no process left")


async def test_nothing_is_left_of_a_killed_router_once_it_runs_again(tmp_path: Path) -> None:
    with running(_make(tmp_path)) as router:
        _furnish(router)
        assert (await _ask(router, "small-a")).status == 200
        before = router.processes()
        assert before
        router.signal(signal.SIGKILL)
        router.wait()
        router.start()
        eventually_sync(lambda: not any(process.is_running() for process in before), what="the end of the old ones")
        assert len(router.servers()) == 3
        assert (await _ask(router, "small-a")).status == 200


async def test_an_upload_that_stalls_holds_up_no_other_change_of_the_store(product: Product) -> None:
    async with connect(product.address) as connection:
        head = f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        await connection.send(head.encode() + b"half")
        assert (await call(product.address, "GET", "/api/tags")).status == 200  # meanwhile it has begun
        async with asyncio.timeout(30):  # half of what the upload may be silent for
            for name in ("copied", "copied-again"):
                copied = {"source": "small-a", "destination": name}
                assert (await call(product.address, "POST", "/api/copy", copied)).status == 200
                assert (await call(product.address, "DELETE", "/api/delete", {"model": name})).status == 200
