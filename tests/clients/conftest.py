"""Pairs of servers with the same models, one direct and one behind a router: real ones and an emulated one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import (
    OLD_REAL_VERSION,
    ModelFile,
    OllamaServer,
    emulated_server,
    real_server,
    write_model_files,
)
from tests.support.product import Product, prepare, running
from tests.support.tiny_model import BIG, EMBED, TINY

Start = Callable[..., AbstractContextManager[OllamaServer]]


@dataclass(frozen=True, slots=True)
class Routed:
    """A router with one server."""

    product: Product
    stage: Stage
    """Reaches the server through the router."""
    behind: OllamaServer
    """The server itself."""

    @property
    def url(self) -> str:
        return self.product.address.url

    @property
    def has_all_apis(self) -> bool:
        """Whether the server has `/v1/messages` and `/v1/responses`."""
        return self.behind.version != OLD_REAL_VERSION


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFile]:
    return write_model_files(tmp_path_factory.mktemp("weights"), {"tiny": TINY, "big": BIG, "embed": EMBED})


_STARTS: Mapping[str, Start] = {
    "real": real_server,
    "real-old": functools.partial(real_server, version=OLD_REAL_VERSION),
    "emulated": emulated_server,
}
_KINDS = [pytest.param(kind, marks=[pytest.mark.ollama] if kind.startswith("real") else []) for kind in _STARTS]


@pytest.fixture(scope="session", params=_KINDS)
def start(request: pytest.FixtureRequest) -> Start:
    return _STARTS[request.param]


@pytest.fixture(scope="session")
def direct(start: Start, files: Mapping[str, ModelFile], tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    with start(tmp_path_factory.mktemp("straight")) as server:
        yield create_models(server, files)


@pytest.fixture(scope="session")
def routed(start: Start, files: Mapping[str, ModelFile], tmp_path_factory: pytest.TempPathFactory) -> Generator[Routed]:
    folder = tmp_path_factory.mktemp("routed")
    with start(folder, OLLAMA_KEEP_ALIVE="-1") as server:
        config = {
            "instances": [{"name": "one", "url": server.url, "num_parallel": 1, "context_length": 4096}],
            "ollama": {"context_length": 4096, "binary": "none"},
            "log": {"format": "json"},
        }
        with running(prepare(folder, config)) as product:
            yield Routed(product, create_models(_as_server(server, product), files), server)


def _as_server(server: OllamaServer, product: Product) -> OllamaServer:
    """The router's address as an `OllamaServer`, with the attributes of its server."""
    assert product.process is not None
    return OllamaServer(
        server.kind, server.version, product.address, product.process, product.log, dict(server.environment)
    )
