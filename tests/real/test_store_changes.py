"""Deleting, recreating and stopping models that are loaded, in use, or shared by several names."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.real.conftest import MakeProduct
from tests.support.ollama_server import ModelFile, write_model_files
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.tiny_model import TINY
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama

_LONG = {"prompt": "x", "options": {"num_predict": 20000, "seed": 1}}
_SHORT = {"prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFile]:
    specs = {f"weights{number}": replace(TINY, seed=200 + number) for number in range(5)}
    return write_model_files(tmp_path_factory.mktemp("own"), specs)


async def _create(product: Product, name: str, file: ModelFile) -> None:
    assert (await call(product.address, "POST", f"/api/blobs/{file.digest}", file.path.read_bytes())).status in (
        200,
        201,
    )
    body = {"model": name, "files": {"m.gguf": file.digest}, "parameters": {"num_thread": 1}, "stream": False}
    assert (await call(product.address, "POST", "/api/create", body)).json() == {"status": "success"}


async def _generate(product: Product, model: str) -> Any:
    reply = await call(product.address, "POST", "/api/generate", {"model": model, **_SHORT})
    return reply.status, reply.json()


def _loaded(product: Product) -> set[str]:
    return {name for names in product.resident().values() for name in names}


def _blob(store: Path, file: ModelFile) -> Path:
    return store / "blobs" / file.digest.replace(":", "-")


async def test_a_model_in_use_is_deleted_after_its_requests_and_accepts_no_new_ones(
    product: Product, store: Path, weights: Mapping[str, ModelFile]
) -> None:
    await _create(product, "doomed", weights["weights0"])
    async with connect(product.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", {"model": "doomed", **_LONG}))
        assert (await busy.head()).status == 200
        assert await busy.chunk()
        deleting = asyncio.ensure_future(call(product.address, "DELETE", "/api/delete", {"model": "doomed"}))

        async def is_refused() -> bool:
            status, answer = await _generate(product, "doomed")
            assert status in (200, 404), answer
            return status == 404 and "being deleted" in answer["error"]

        await eventually(is_refused)
        assert await busy.chunk()
        assert not deleting.done()
        assert _blob(store, weights["weights0"]).is_file()
        busy.abort()
        assert (await deleting).status == 200
    assert not _blob(store, weights["weights0"]).is_file()
    assert "doomed:latest" not in _loaded(product)
    status, answer = await _generate(product, "doomed")
    assert (status, answer) == (404, {"error": "model 'doomed' not found"})


async def test_deleting_one_name_of_shared_weights_unloads_nothing(
    product: Product, weights: Mapping[str, ModelFile]
) -> None:
    await _create(product, "first-name", weights["weights1"])
    copy_body = {"source": "first-name", "destination": "second-name"}
    assert (await call(product.address, "POST", "/api/copy", copy_body)).status == 200
    assert (await _generate(product, "first-name"))[0] == 200
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "first-name"})).status == 200
    assert _loaded(product) & {"first-name:latest", "second-name:latest"}  # listed under the name that loaded it
    assert (await _generate(product, "second-name"))[0] == 200
    # a model loaded under a deleted name can still be unloaded and deleted
    await call(product.address, "POST", "/api/generate", {"model": "second-name", "keep_alive": 0})
    await eventually(lambda: not _loaded(product) & {"first-name:latest", "second-name:latest"})
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "second-name"})).status == 200


async def test_recreating_a_model_unloads_and_deletes_its_old_weights(
    product: Product, store: Path, weights: Mapping[str, ModelFile]
) -> None:
    await _create(product, "again", weights["weights2"])
    assert (await _generate(product, "again"))[0] == 200
    await _create(product, "again", weights["weights3"])
    await eventually(lambda: not _blob(store, weights["weights2"]).exists(), what="the end of the old weights")
    await eventually(lambda: "again:latest" not in _loaded(product), what="the end of the old runner")
    assert (await _generate(product, "again"))[0] == 200
    assert not any("llamayard" in model["name"] for model in product.call("GET", "/api/tags")[1]["models"])
    assert (await call(product.address, "DELETE", "/api/delete", {"model": "again"})).status == 200


async def test_copying_over_a_model_unloads_and_deletes_its_old_weights(
    product: Product, store: Path, weights: Mapping[str, ModelFile]
) -> None:
    await _create(product, "in-use", weights["weights3"])
    await _create(product, "next", weights["weights4"])
    assert (await _generate(product, "in-use"))[0] == 200
    copy_body = {"source": "next", "destination": "in-use"}
    assert (await call(product.address, "POST", "/api/copy", copy_body)).status == 200
    await eventually(lambda: not _blob(store, weights["weights3"]).exists(), what="the end of the old weights")
    await eventually(lambda: "in-use:latest" not in _loaded(product), what="the end of the old runner")
    assert (await _generate(product, "in-use"))[0] == 200
    assert _blob(store, weights["weights4"]).is_file()
    for name in ("in-use", "next"):
        assert (await call(product.address, "DELETE", "/api/delete", {"model": name})).status == 200


async def test_stopping_a_busy_model_does_not_cut_its_stream(product: Product) -> None:
    async with connect(product.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", {"model": "big", **_LONG}))
        assert (await busy.head()).status == 200
        assert await busy.chunk()
        stop = await call(product.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
        assert (stop.status, stop.json()["done_reason"]) == (200, "unload")
        assert await busy.chunk()
        assert "big:latest" in _loaded(product)
        busy.abort()
    await eventually(lambda: "big:latest" not in _loaded(product))


async def test_the_longest_keep_alive_of_concurrent_requests_wins(product: Product) -> None:
    def row() -> dict[str, Any]:
        rows = product.call("GET", "/api/ps")[1]["models"]
        return next((entry for entry in rows if entry["name"] == "big:latest"), {"llamayard": {}, "expires_at": ""})

    long_request = {"model": "big", **_LONG, "keep_alive": "20m"}
    async with connect(product.address) as busy:
        await busy.send(request_bytes("POST", "/api/generate", long_request))
        assert (await busy.head()).status == 200
        short_request = {"model": "big", **_SHORT, "keep_alive": 0}
        assert (await call(product.address, "POST", "/api/generate", short_request)).status == 200
        assert await busy.chunk()
        busy.abort()
    await eventually(lambda: row()["llamayard"].get("in_flight") == 0)
    assert "big:latest" in _loaded(product)
    assert not row()["expires_at"].startswith(("22", "23"))  # not forever
    # with a single user, the last keep-alive applies
    assert (await call(product.address, "POST", "/api/generate", short_request)).status == 200
    await eventually(lambda: "big:latest" not in _loaded(product))


async def test_ps_shows_the_instance_of_each_model(product: Product) -> None:
    assert (await _generate(product, "big"))[0] == 200
    rows = (await call(product.address, "GET", "/api/ps")).json()["models"]
    (row,) = [entry for entry in rows if entry["name"] == "big:latest"]
    assert row["llamayard"]["instance"] in ("a", "b")
    assert (row["llamayard"]["slots"], row["llamayard"]["gpus"]) == (2, [])
    assert row["llamayard"]["in_flight"] == 0


def test_the_servers_error_for_a_full_disk_is_passed_through(make_product: MakeProduct, tmp_path: Path) -> None:
    """Simulated by a file size limit, which fails the write at the same place."""
    folder = tmp_path / "small"
    folder.mkdir()
    data = os.urandom(3 * 1024 * 1024)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    template = make_product(ollama={"models": str(folder / "models")})
    limited = prepare(folder, _config_tree(template), port=template.address.port)
    limited.program = ("sh", "-c", 'ulimit -f 4096; exec "$0" "$@"', *limited.program)  # 2 MiB
    with running(limited) as product:
        status, answer = product.call("POST", f"/api/blobs/{digest}", data)
        assert (status, "file too large" in answer["error"]) == (500, True), answer
        assert product.call("GET", "/api/tags") == (200, {"models": []})


def _config_tree(product: Product) -> Any:
    return yaml.safe_load(product.config.read_text(encoding="utf-8"))


async def test_a_loading_model_can_be_stopped(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
    await eventually(lambda: "big:latest" not in _loaded(product))
    pending = asyncio.ensure_future(_generate(product, "big"))

    def is_loading() -> bool:
        rows = product.call("GET", "/llamayard/status")[1]["models"]
        return any(row["name"] == "big:latest" and row["state"] in ("planned", "loading") for row in rows)

    await eventually(is_loading)
    await call(product.address, "POST", "/api/generate", {"model": "big", "keep_alive": 0})
    status, answer = await pending
    assert (status, answer["done"]) == (200, True)
    await eventually(lambda: "big:latest" not in _loaded(product))
