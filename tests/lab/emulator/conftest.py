"""Emulated servers on emulated GPUs, at fifty times real speed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from router.lab.emulator import vram
from router.lab.emulator.gpu_reader import EmulatedGpuReader
from router.lab.emulator.prepare import PreparedEmulator, prepare_emulator
from tests.support.ollama_server import OllamaServer, emulated_server

SPEED = 50.0


@dataclass(slots=True)
class Box:
    """One emulated machine; `start` runs a server on some of its GPUs."""

    emulator: PreparedEmulator
    folder: Path
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def directory(self) -> Path:
        return Path(self.emulator.environment["LLAMAYARD_RIG_DIR"])

    @property
    def uuids(self) -> list[str]:
        return [gpu.uuid for gpu in EmulatedGpuReader(self.directory).read()]

    def used_gb(self) -> list[float]:
        """Used memory of each GPU, in GB."""
        used = vram.used_bytes(self.directory)
        return [round(used.get(uuid, 0) / 1e9, 1) for uuid in self.uuids]

    @contextlib.contextmanager
    def start(self, *gpus: int, **environment: str) -> Generator[OllamaServer]:
        """A server that sees these GPUs; context of 8,192 tokens unless overridden."""
        folder = self.folder / f"home{next(self.numbers)}"
        folder.mkdir()
        visible = ",".join(self.uuids[index] for index in gpus) or "-1"
        full = {
            **self.emulator.environment,
            "OLLAMA_MODELS": str(self.emulator.models_directory),
            "CUDA_VISIBLE_DEVICES": visible,
            "OLLAMA_CONTEXT_LENGTH": "8192",
            **environment,
        }
        with emulated_server(folder, **full) as server:
            yield server


MakeBox = Callable[..., AbstractContextManager[Box]]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """Two 3090s with all catalogue models, version 0.24.0."""
    return make_box(tmp_path, "2x3090")


def make_box(folder: Path, text: str, version: str = "0.24.0", deviation: str = "off") -> Box:
    """An emulated machine, by default with exact sizes."""
    environment = {
        "LLAMAYARD_RIG_SPEED": str(SPEED),
        "LLAMAYARD_RIG_VERSION": version,
        "LLAMAYARD_RIG_DEVIATION": deviation,
    }
    return Box(prepare_emulator(text, folder / "rig", environment), folder)


def ask(server: OllamaServer, model: str, **fields: Any) -> tuple[int, Any]:
    """Generates a short, non-streamed answer."""
    body = {"model": model, "prompt": "hello", "stream": False, **fields}
    body["options"] = {"num_predict": 4, **fields.get("options", {})}
    return server.call("POST", "/api/generate", body)


def loaded(server: OllamaServer) -> dict[str, dict[str, Any]]:
    """Entries of `/api/ps` by model name."""
    status, answer = server.call("GET", "/api/ps")
    assert status == 200
    return {entry["name"]: entry for entry in answer["models"]}
