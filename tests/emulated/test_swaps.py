"""Which models stay loaded side by side: real processes on emulated GPUs and servers."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running

pytestmark = pytest.mark.rig

_EMBEDDER = "nomic-embed-text"


@pytest.fixture
def product(tmp_path: Path) -> Generator[Product]:
    config: dict[str, Any] = {
        "log": {"format": "json"},
        "placement": {"exclusive_gpus": {"1": ["llama3.1:8b", _EMBEDDER]}},
    }
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", "2x3090"))) as router:
        yield router


def _replicas(product: Product) -> dict[str, list[str]]:
    """Instances by the model that is loaded there."""
    found: dict[str, list[str]] = {}
    for row in product.call("GET", "/llamayard/status")[1]["models"]:
        found.setdefault(row["name"], []).append(row["instance"])
    return found


def test_every_spelling_of_an_embedding_models_context_shares_one_replica(product: Product) -> None:
    """Trained for 2,048 tokens, served with 8,192: on all routes that is the same load."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/api/embed", {}),
        ("/v1/embeddings", {}),
        ("/api/embed", {"options": {"num_ctx": 2048}}),
        ("/api/embed", {"options": {"num_ctx": 32_768}}),
        ("/v1/embeddings", {}),
    ]
    for path, options in bodies:
        assert product.call("POST", path, {"model": _EMBEDDER, "input": "a text", **options})[0] == 200
    assert _replicas(product) == {f"{_EMBEDDER}:latest": ["gpu1"]}
    events = [json.loads(line)["event"] for line in product.log_text().splitlines() if line.startswith("{")]
    assert events.count("load") == events.count("loaded") == 1
    (entry,) = product.call("GET", "/api/ps")[1]["models"]
    assert entry["context_length"] == 2048


def test_a_model_is_loaded_on_its_exclusive_gpu_and_stays_when_another_comes(product: Product) -> None:
    for name in ("llama3.1:8b", "qwen2.5-coder:32b"):
        request = {"model": name, "prompt": "hi", "stream": False, "options": {"num_predict": 1}}
        assert product.call("POST", "/api/generate", request)[0] == 200
    placed = _replicas(product)
    assert placed["llama3.1:8b"] == ["gpu1"]
    assert placed["qwen2.5-coder:32b"][0].startswith("gpu0")


@pytest.fixture
def equal_gpus(tmp_path: Path) -> Generator[Product]:
    config = {"log": {"format": "json"}, "state_directory": str(tmp_path / "state")}
    rig = tmp_path / "exact.yaml"
    rig.write_text("{gpus: 2x3090, deviation: off}\n")  # loads that take more than usual leave no room for both
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", str(rig)))) as router:
        yield router


def _ask_in_turn(product: Product, turns: int) -> None:
    large = {"model": "llama3.3:70b", "prompt": "hi", "stream": False, "options": {"num_predict": 1}}
    for _ in range(turns):
        assert product.call("POST", "/api/generate", large)[0] == 200
        assert product.call("POST", "/api/embed", {"model": _EMBEDDER, "input": "a text"})[0] == 200


def test_a_70b_and_an_embedding_model_that_are_asked_in_turn_do_not_evict_each_other_for_ever(
    equal_gpus: Product,
) -> None:
    """Two slots of the 70B fill both GPUs; with one slot there is room for both models."""
    _ask_in_turn(equal_gpus, 1)  # measures both
    equal_gpus.signal(signal.SIGTERM)
    equal_gpus.wait()
    equal_gpus.start()
    _ask_in_turn(equal_gpus, 5)
    assert set(_replicas(equal_gpus)) == {"llama3.3:70b", f"{_EMBEDDER}:latest"}
    events = [json.loads(line)["event"] for line in equal_gpus.log_text().splitlines() if line.startswith("{")]
    assert events.count("loaded") <= 4
