"""The whole program on emulated GPUs and servers: `serve --rig 2x3090`.

Models are sparse files in the servers' shared store; the servers report what is loaded where.
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


def _add_models(product: Product) -> None:
    (store,) = {process.environ()["OLLAMA_MODELS"] for process in product.servers().values()}
    for name, spec in _SPECS.items():
        put_into_store(Path(store), name, spec)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    with running(_make(tmp_path_factory.mktemp("rig"))) as router:
        _add_models(router)
        yield router


async def _ask(product: Product, model: str, **fields: Any) -> Reply:
    body = {"model": model, "prompt": "hello", "options": {"num_predict": 4}, **fields}
    return await call(product.address, "POST", "/api/generate", body)


def _gpus_of(product: Product, model: str) -> list[int]:
    """Number of GPUs visible to each server that has the model loaded."""
    servers = product.servers()
    ports = [port for port, names in product.resident().items() if f"{model}:latest" in names]
    return [len(servers[port].environ()["CUDA_VISIBLE_DEVICES"].split(",")) for port in ports]


async def _unload_all(product: Product) -> None:
    for name in _SPECS:
        await call(product.address, "POST", "/api/generate", {"model": name, "keep_alive": 0})
    await eventually(lambda: not any(product.resident().values()), what="nothing loaded")


async def test_there_is_one_server_per_gpu_and_one_for_all(product: Product) -> None:
    visible_gpus = [process.environ()["CUDA_VISIBLE_DEVICES"].split(",") for process in product.servers().values()]
    assert sorted(map(len, visible_gpus)) == [1, 1, 2]
    (spread,) = [gpus for gpus in visible_gpus if len(gpus) == 2]
    assert sorted(gpus[0] for gpus in visible_gpus if len(gpus) == 1) == sorted(spread)
    assert all(gpu.startswith("GPU-") for gpu in spread)


async def test_small_models_go_to_single_gpus(product: Product) -> None:
    await _unload_all(product)
    for name in ("small-a", "small-b"):
        reply = await _ask(product, name)
        assert (reply.status, reply.end, reply.lines()[-1]["done"]) == (200, "complete", True)
        assert _gpus_of(product, name) == [1]


async def test_a_70b_model_is_split_over_both_gpus_without_the_cpu(product: Product) -> None:
    await _unload_all(product)
    reply = await _ask(product, "seventy", options={"num_predict": 4, "num_ctx": 2048})
    assert (reply.status, reply.lines()[-1]["done"]) == (200, True), reply.body
    assert _gpus_of(product, "seventy") == [2]
    (entry,) = [m for m in product.call("GET", "/api/ps")[1]["models"] if m["name"] == "seventy:latest"]
    assert entry["size_vram"] == entry["size"] > 40_000_000_000


async def test_a_70b_model_is_served_on_two_3090_without_configuration(product: Product) -> None:
    """With the default KV cache type two slots do not fit, but one does."""
    await _unload_all(product)
    reply = await _ask(product, "seventy")
    assert (reply.status, reply.lines()[-1]["done"]) == (200, True), reply.body
    assert _gpus_of(product, "seventy") == [2]


async def test_a_small_model_evicts_an_idle_large_one(product: Product) -> None:
    await _unload_all(product)
    assert (await _ask(product, "seventy", options={"num_predict": 4, "num_ctx": 2048})).status == 200
    assert (await _ask(product, "small-a")).status == 200
    assert _gpus_of(product, "small-a") == [1]


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
async def test_a_model_that_fits_nowhere_is_refused_with_needed_and_available_bytes(
    product: Product, path: str
) -> None:
    reply = await call(product.address, "POST", path, {"model": "huge", "prompt": "hello"})
    assert reply.status == 422
    error = reply.json()["error"]
    message = error if path.startswith("/api") else error["message"]
    assert "huge" in message
    assert len(re.findall(r"\d+(?:\.\d+)? ?(?:[KMGT]i?)?B|\d{9,}", message)) >= 2, message  # needed and available
    assert _gpus_of(product, "huge") == []


async def test_status_and_log_are_marked_as_emulated(product: Product) -> None:
    status = product.call("GET", "/llamayard/status")[1]
    assert "emulated" in json.dumps(status).lower()
    assert "emulated" in product.log_text().lower()


async def test_status_shows_the_gpus(product: Product) -> None:
    status = product.call("GET", "/llamayard/status")[1]
    assert "3090" in json.dumps(status)
    names = {instance["name"] for instance in status["instances"]}
    assert names >= {"gpu0", "gpu1", "spread"}
    assert all(name.startswith("gpu") for name in names - {"spread"})


async def test_a_replica_with_a_leaked_slot_is_reloaded(tmp_path: Path) -> None:
    config = {"stream": {"first_byte_timeout_seconds": 2.0}, "ollama": {"num_parallel": 1}}
    product = prepare(tmp_path, config, _FAST, ("--rig", "h100"))
    with running(product):
        _add_models(product)
        write_faults(tmp_path / "state" / "rig", [{"lose_slot": True}])
        text = " ".join(map(str, range(20_000)))  # outlasts the test, and has no repetitions that would end the answer
        async with connect(product.address) as disconnecting:
            long = {"model": "small-a", "prompt": "x", "format": {"const": text}}
            await disconnecting.send(request_bytes("POST", "/api/generate", long))
            await disconnecting.head()
            assert await disconnecting.chunk()
            disconnecting.abort()
        timed_out = await _ask(product, "small-a", stream=False)
        assert (timed_out.status, timed_out.header("X-Llamayard-Error")) == (504, "wait_timeout")
        write_faults(tmp_path / "state" / "rig", [])

        async def is_served() -> bool:
            return (await _ask(product, "small-a", stream=False)).status == 200

        await eventually(is_served, what="a served request")


def test_no_processes_remain_after_sigterm(tmp_path: Path) -> None:
    with running(_make(tmp_path)) as router:
        assert len(router.servers()) == 3
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
        eventually_sync(lambda: not router.processes(), what="no process left")


async def test_a_restarted_router_removes_the_processes_of_a_killed_one(tmp_path: Path) -> None:
    with running(_make(tmp_path)) as router:
        _add_models(router)
        assert (await _ask(router, "small-a")).status == 200
        before = router.processes()
        assert before
        router.signal(signal.SIGKILL)
        router.wait()
        router.start()
        eventually_sync(
            lambda: not any(process.is_running() for process in before), what="the end of the old processes"
        )
        assert len(router.servers()) == 3
        assert (await _ask(router, "small-a")).status == 200


async def test_a_stalled_upload_does_not_block_other_store_changes(product: Product) -> None:
    async with connect(product.address) as connection:
        head = f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        await connection.send(head.encode() + b"half")
        assert (await call(product.address, "GET", "/api/tags")).status == 200  # the upload has started by then
        async with asyncio.timeout(30):  # half of the upload's idle timeout
            for name in ("copied", "copied-again"):
                copy_body = {"source": "small-a", "destination": name}
                assert (await call(product.address, "POST", "/api/copy", copy_body)).status == 200
                assert (await call(product.address, "DELETE", "/api/delete", {"model": name})).status == 200
