"""A model that somebody loads on a server directly is found, used, and booked by what its processes hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import blocking_call
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_QUICK_POLLS = {"poll": {"catalog_seconds": 0.2, "gpu_seconds": 0.2, "residency_seconds": 0.2}}


def _rows(product: Product) -> tuple[list[Any], list[Any]]:
    """Loaded models, and what each process holds on the GPU, by the driver."""
    status = product.call("GET", "/llamayard/status")[1]
    (gpu,) = status["gpus"]
    return status["models"], [process["used_bytes"] for process in gpu["processes"]]


async def test_a_found_model_is_booked_by_its_processes(tmp_path: Path) -> None:
    with running(prepare(tmp_path, _QUICK_POLLS, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", "3090"))) as product:
        (port,) = product.servers()
        asked = {"model": "llama3.1:8b", "keep_alive": -1, "stream": False}
        assert blocking_call(Address("127.0.0.1", port), "POST", "/api/generate", asked)[0] == 200

        def is_booked() -> bool:
            models, processes = _rows(product)
            return [model["per_gpu_bytes"] for model in models] == [processes] and len(processes) == 1

        await eventually(is_booked, what="the bytes of the process")
        (model,), _ = _rows(product)
        assert (model["reason"], model["cpu_ratio"]) == ("found loaded on gpu0", 0.0)
        assert model["per_gpu_bytes"] != [model["size_vram_bytes"]]
