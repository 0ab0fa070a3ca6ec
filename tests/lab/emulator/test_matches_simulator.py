"""An emulated server places models exactly as the simulated server of its version does, to the megabyte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import pytest

from router.domain.gpu import GpuUuid
from router.lab.emulator import vram
from router.lab.emulator.loader import LOADS_FILE
from router.lab.emulator.spec import parse_spec
from router.lab.scenarios import model_facts, sim_gpus
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.server import LoadResult, SimServer
from tests.lab.emulator.conftest import Box, make_box
from tests.lab.simulator.machines import new_machine, play
from tests.support.ollama_server import OllamaServer
from tests.support.waiting import eventually_sync

GPUS = "2x3090"
SETTINGS = {"OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_NUM_PARALLEL": "2"}
"""The settings of the simulated servers."""
MODELS = ("llama3.1:8b", "qwen2.5:14b", "gemma2:27b", "qwen2.5-coder:32b", "llama3.3:70b")
Allocations = Mapping[str, Mapping[str, int]]
"""Model -> GPU -> megabytes; rounded, because file sizes include small layers in one place but not in the other."""


def simulated(version: str, names: Iterable[str]) -> list[Allocations]:
    """The server's allocations after each load."""
    gpus = sim_gpus(parse_spec(GPUS))
    models = {name: model_facts(name) for name in names}
    machine = new_machine(*gpus, warm=tuple(models.values()))
    config = ServerConfig(version=tuple(int(part) for part in version.split(".")))
    server = SimServer(machine, "ollama", tuple(gpu.uuid for gpu in gpus), config)
    allocations: list[Allocations] = []
    for model in models.values():
        results: list[LoadResult] = []
        server.load(model, -1, results.append)
        play(machine, machine.timeline.now + 60.0)
        assert [result.error for result in results] == [""]
        allocations.append({loaded.model.name: _megabytes(loaded.bytes_by_gpu) for loaded in server.loaded})
    return allocations


def emulated(box: Box, server: OllamaServer, names: Iterable[str]) -> list[Allocations]:
    """The same for the emulated server."""
    return [_load(box, server, name) for name in names]


def _load(box: Box, server: OllamaServer, name: str) -> Allocations:
    assert server.call("POST", "/api/generate", {"model": name})[0] == 200
    listed = [entry["name"] for entry in server.call("GET", "/api/ps")[1]["models"]]
    loads = [json.loads(line) for line in (box.directory / LOADS_FILE).read_text("utf-8").splitlines()]
    by_model = {load["model"]: load["bytes_by_gpu"] for load in loads}
    held = sorted(sorted(use.bytes_by_gpu.items()) for use in vram.allocations(box.directory))
    assert held == sorted(sorted(by_model[model].items()) for model in listed)
    return {model: _megabytes(by_model[model]) for model in listed}


def _megabytes(bytes_by_gpu: Mapping[GpuUuid, int] | Mapping[str, int]) -> dict[str, int]:
    return {str(gpu): round(size / 1e6) for gpu, size in bytes_by_gpu.items()}


@pytest.mark.parametrize("version", ["0.24.0", "0.34.0"])
def test_each_model_alone_takes_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, version: str) -> None:
    box = make_box(tmp_path_factory.mktemp("box"), GPUS, version)
    allocations: list[Allocations] = []
    with box.start(0, 1, **SETTINGS) as server:
        for name in MODELS:
            allocations += emulated(box, server, [name])
            assert server.call("POST", "/api/generate", {"model": name, "keep_alive": 0})[0] == 200
            eventually_sync(lambda: not any(box.used_gb()))
    assert allocations == [simulated(version, [name])[0] for name in MODELS]


@pytest.mark.parametrize("version", ["0.24.0", "0.34.0"])
@pytest.mark.parametrize(
    "names",
    [("gemma2:27b", "llama3.1:8b", "qwen2.5:14b", "mistral:7b"), ("qwen2.5:14b", "qwen2.5:7b", "deepseek-r1:32b"),
     ("llama3.1:8b", "qwen2.5-coder:32b", "mistral:7b", "llama3.2:3b"),
     ("phi4:14b", "llama3.1:8b", "qwen2.5-coder:32b", "qwen2.5:7b")],
)  # fmt: skip
def test_placement_and_eviction_of_several_models_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, version: str, names: tuple[str, ...]
) -> None:
    box = make_box(tmp_path_factory.mktemp("box"), GPUS, version)
    with box.start(0, 1, **SETTINGS) as server:
        assert emulated(box, server, names) == simulated(version, names)
