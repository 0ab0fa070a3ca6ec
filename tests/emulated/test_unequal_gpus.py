"""A model on GPUs of unequal memory: real processes on emulated GPUs and servers of 0.33.0."""

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
    emulator = {"LLAMAYARD_RIG_SPEED": "8", "LLAMAYARD_RIG_VERSION": "0.33.0"}
    with running(prepare(tmp_path, config, emulator, ("--rig", "4080+5090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "seventy", LLAMA_70B)
        yield router


def test_a_model_is_split_over_unequal_gpus_in_proportion_to_their_memory(product: Product) -> None:
    """It fits in 16 + 32 GB, but half of it does not fit in 16 GB."""
    request = {"model": "seventy", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    status, answer = product.call("POST", "/api/chat", request)
    assert (status, answer["done"]) == (200, True)
    (entry,) = product.call("GET", "/api/ps")[1]["models"]
    assert entry["size_vram"] == entry["size"]
    router_status = product.call("GET", "/llamayard/status")[1]
    (replica,) = router_status["models"]
    small, large = sorted(replica["per_gpu_bytes"])
    assert 1.9 < large / small < 2.2
    tensor_splits = {process.environ().get("LLAMA_ARG_TENSOR_SPLIT") for process in product.servers().values()}
    assert "30,14" in tensor_splits  # the instance on all GPUs has the faster GPU first
    loads = [json.loads(line) for line in product.log_text().splitlines() if '"loaded"' in line]
    assert [load["model"] for load in loads] == ["seventy:latest"]
