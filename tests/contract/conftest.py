"""Servers of the contract tests: real and emulated Ollama with the same models, created once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.contract.stage import Stage, create_models
from tests.support.ollama_server import (
    OLD_REAL_VERSION,
    REAL_VERSION,
    ModelFile,
    OllamaServer,
    emulated_server,
    real_server,
    write_model_files,
)
from tests.support.rawhttp import Address
from tests.support.tiny_model import BIG, EMBED, TINY

_REAL = {"real": REAL_VERSION, "real-old": OLD_REAL_VERSION}
_EMULATED = {"emulated": REAL_VERSION, "emulated-0.24": "0.24.0", "emulated-old": OLD_REAL_VERSION}
"""The recorded versions, and the old version of the real server in tests."""

Start = Callable[..., AbstractContextManager[OllamaServer]]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFile]:
    return write_model_files(tmp_path_factory.mktemp("weights"), {"tiny": TINY, "big": BIG, "embed": EMBED})


@pytest.fixture(scope="session", params=[*(pytest.param(kind, marks=pytest.mark.ollama) for kind in _REAL), *_EMULATED])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def start(kind: str) -> Start:
    """Starts another server of the kind under test: `start(folder, OLLAMA_NUM_PARALLEL="1")`."""
    if kind in _REAL:
        return functools.partial(real_server, version=_REAL[kind])
    return functools.partial(emulated_server, LLAMAYARD_RIG_VERSION=_EMULATED[kind])


@pytest.fixture(scope="session")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home and model store of the shared servers."""
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="session")
def stage(start: Start, folder: Path, files: Mapping[str, ModelFile]) -> Generator[Stage]:
    """The shared server. Tests set up the state they need and leave no requests running."""
    with start(folder) as server:
        yield create_models(server, files)


@pytest.fixture
def server(stage: Stage) -> OllamaServer:
    return stage.server


@pytest.fixture
def address(stage: Stage) -> Address:
    return stage.server.address
