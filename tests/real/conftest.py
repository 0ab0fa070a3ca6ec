"""The router with two real servers without GPUs, and small models with random weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import OLD_REAL_VERSION, REAL_VERSION, ModelFile, real_binary, write_model_files
from tests.support.product import Product, prepare, running
from tests.support.tiny_model import BIG, EMBED, TINY

MakeProduct = Callable[..., Product]


@pytest.fixture(scope="session", params=[REAL_VERSION, OLD_REAL_VERSION])
def version(request: pytest.FixtureRequest) -> str:
    """The servers' version: the current one first."""
    return request.param


@pytest.fixture(scope="session")
def binary(version: str) -> Path:
    return real_binary(version)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFile]:
    specs = {"tiny": TINY, "other": replace(TINY, seed=2), "big": BIG, "embed": EMBED}
    return write_model_files(tmp_path_factory.mktemp("weights"), specs)


def two_instances(binary: Path, models: Path, **overrides: Any) -> dict[str, Any]:
    """Configuration with two supervised servers without GPUs."""
    ollama = {"binary": str(binary), "models": str(models), "num_parallel": 2, **overrides.pop("ollama", {})}
    return {
        "ollama": ollama,
        "instances": [{"name": "a", "gpus": []}, {"name": "b", "gpus": []}],
        "log": {"format": "json"},
        **overrides,
    }


def create_models(product: Product, files: Mapping[str, ModelFile]) -> None:
    """Uploads the weights and creates the models through the router."""
    for name, file in files.items():
        status, answer = product.call("POST", f"/api/blobs/{file.digest}", file.path.read_bytes())
        assert status in (200, 201), (name, status, answer)
        body = {"model": name, "files": {file.path.name: file.digest}, "parameters": {"num_thread": 1}, "stream": False}
        assert product.call("POST", "/api/create", body) == (200, {"status": "success"})
    short = {"model": "short", "from": "tiny", "parameters": {"num_thread": 1, "num_predict": 8}, "stream": False}
    assert product.call("POST", "/api/create", short) == (200, {"status": "success"})


@pytest.fixture(scope="session")
def store(binary: Path, files: Mapping[str, ModelFile], tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A model store with the test models, created once through a separate router."""
    folder = tmp_path_factory.mktemp("store")
    with running(prepare(folder, two_instances(binary, folder / "models"))) as product:
        create_models(product, files)
    yield folder / "models"


@pytest.fixture(scope="session")
def product(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    """The shared router. Tests restore its state."""
    with running(prepare(tmp_path_factory.mktemp("shared"), two_instances(binary, store))) as shared:
        yield shared


@pytest.fixture
def make_product(binary: Path, store: Path, tmp_path: Path) -> Generator[MakeProduct]:
    """Creates routers for one test, which may kill them; cleans up afterwards."""
    products: list[Product] = []

    def make(**overrides: Any) -> Product:
        products.append(prepare(tmp_path, two_instances(binary, store, **overrides)))
        return products[-1]

    yield make
    for product in products:
        product.destroy()
