"""A model over GPUs of unequal memory: real processes over emulated GPUs and servers of 0.33.0."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.sparse_model import LLAMA_70B, put_into_store

pytestmark = pytest.mark.rig

_OLLAMA = {"flash_attention": True, "kv_cache_type": "q8_0", "num_parallel": 2, "context_length": 8192}


@pytest.fixture
def product(tmp_path: Path) -> Generator[Product]:
    config: dict[str, Any] = {"log": {"format": "json"}, "ollama": _OLLAMA}
    emulated = {"LLAMAYARD_RIG_SPEED": "8", "LLAMAYARD_RIG_VERSION": "0.33.0"}
    with running(prepare(tmp_path, config, emulated, ("--rig", "4080+5090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "seventy", LLAMA_70B)
        yield router


def test_a_model_goes_over_unequal_gpus_in_shares_of_their_memory(product: Product) -> None:
    """16 and 32 GB hold it, and 16 GB would not hold half of it."""
    asked = {"model": "seventy", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    status, answer = product.call("POST", "/api/chat", asked)
    assert (status, answer["done"]) == (200, True)
    (entry,) = product.call("GET", "/api/ps")[1]["models"]
    assert entry["size_vram"] == entry["size"]
    known = product.call("GET", "/llamayard/status")[1]
    (copy,) = known["models"]
    small, large = sorted(copy["per_gpu_bytes"])
    assert 1.9 < large / small < 2.2
    told = {process.environ().get("LLAMA_ARG_TENSOR_SPLIT") for process in product.servers().values()}
    assert "30,14" in told  # the instance over all has the faster GPU first
    loads = [json.loads(line) for line in product.log_text().splitlines() if '"loaded"' in line]
    assert [load["model"] for load in loads] == ["seventy:latest"]
