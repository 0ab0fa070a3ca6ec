"""Models that exist only on an attached server: listed with their instance, served and managed only there."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.ollama_server import (
    ModelFile,
    OllamaServer,
    create_from_file,
    real_server,
    write_model_files,
)
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import call
from tests.support.tiny_model import TINY
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama

_SHORT = {"prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Generator[OllamaServer]:
    """An attached server with a separate store; it also has a `tiny`, but with other weights."""
    folder = tmp_path_factory.mktemp("far")
    specs = {"faraway": replace(TINY, seed=300), "tiny": replace(TINY, seed=301)}
    with real_server(folder) as server:
        files: Mapping[str, ModelFile] = write_model_files(folder / "weights", specs)
        for name, file in files.items():
            create_from_file(server, name, file.path, file.digest)
        yield server


@pytest.fixture(scope="module")
def mixed(
    binary: Path, store: Path, attached: OllamaServer, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Product]:
    """A router with one supervised server on the shared store, and the attached server."""
    config = {
        "ollama": {"binary": str(binary), "models": str(store), "num_parallel": 1},
        "instances": [{"name": "own", "gpus": []}, {"name": "far", "url": attached.url, "num_parallel": 1}],
        "log": {"format": "json"},
    }
    with running(prepare(tmp_path_factory.mktemp("mixed"), config)) as product:
        yield product


async def _both_ready(product: Product) -> None:
    def ready() -> bool:
        return {instance["state"] for instance in product.call("GET", "/llamayard/status")[1]["instances"]} == {"ready"}

    await eventually(ready, what="both instances")


async def test_lists_mark_models_of_the_attached_server_with_their_instance(mixed: Product) -> None:
    await _both_ready(mixed)
    rows = {row["name"]: row for row in (await call(mixed.address, "GET", "/api/tags")).json()["models"]}
    assert rows["faraway:latest"]["llamayard"] == {"instances": ["far"]}
    assert "llamayard" not in rows["big:latest"]
    assert "llamayard" not in rows["tiny:latest"]  # the shared store's model has that name
    listed = (await call(mixed.address, "GET", "/v1/models")).json()
    assert listed["object"] == "list"
    assert {row["id"] for row in listed["data"]} >= {"faraway:latest", "big:latest"}


async def test_each_model_is_served_where_it_exists(mixed: Product) -> None:
    await _both_ready(mixed)
    for name, instance in (("faraway", "far"), ("tiny", "own"), ("other", "own")):
        reply = await call(mixed.address, "POST", "/api/generate", {"model": name, **_SHORT})
        assert (reply.status, reply.header("X-Llamayard-Instance")) == (200, instance), (name, reply.body)
    assert (await call(mixed.address, "POST", "/api/show", {"model": "faraway"})).status == 200
    assert (await call(mixed.address, "GET", "/v1/models/faraway")).json()["id"] == "faraway"
    loaded = {row["name"]: row["llamayard"]["instance"] for row in mixed.call("GET", "/api/ps")[1]["models"]}
    assert loaded["faraway:latest"] == "far"


async def test_the_router_does_not_manage_a_model_of_the_attached_server(
    mixed: Product, attached: OllamaServer
) -> None:
    await _both_ready(mixed)
    for method, path, body in (
        ("DELETE", "/api/delete", {"model": "faraway"}),
        ("POST", "/api/copy", {"source": "faraway", "destination": "near"}),
        ("POST", "/api/push", {"model": "faraway"}),
        ("POST", "/api/create", {"model": "near", "from": "faraway", "system": "short", "stream": False}),
    ):
        reply = await call(mixed.address, method, path, body)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (403, "forbidden")
        assert "only on far" in reply.json()["error"]
        verb = "create from" if path == "/api/create" else path.removeprefix("/api/")
        assert f"{verb} it there" in reply.json()["error"]
    assert any(model["name"] == "faraway:latest" for model in attached.call("GET", "/api/tags")[1]["models"])


async def test_a_name_in_both_stores_always_means_the_shared_store(mixed: Product, attached: OllamaServer) -> None:
    """Requests for it never load the attached server's model of that name."""
    await _both_ready(mixed)
    for _ in range(2):
        reply = await call(mixed.address, "POST", "/api/generate", {"model": "tiny", **_SHORT})
        assert reply.header("X-Llamayard-Instance") == "own"
    assert not any(model["name"] == "tiny:latest" for model in attached.call("GET", "/api/ps")[1]["models"])
