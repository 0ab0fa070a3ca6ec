"""A model is loaded once for its first request, whatever its Modelfile says of the runner."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import Routed

_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"num_thread": 1},
    {"num_thread": 1, "num_ctx": 2048},
    {"num_thread": 1, "num_batch": 128, "num_ctx": 8192},
]
_OPTIONS = {"num_predict": 2, "seed": 1}


def _loads(routed: Routed) -> int:
    return routed.behind.log.read_text(errors="replace").count("llama runner started")


@pytest.mark.parametrize("parameters", _PARAMETERS, ids=str)
def test_a_cold_model_is_loaded_once_and_serves_what_follows(routed: Routed, parameters: dict[str, Any]) -> None:
    stage = routed.stage
    stage.post("/api/create", {"model": "written", "from": "tiny", "parameters": parameters, "stream": False})
    stage.unload_all()
    before = _loads(routed)
    for asked in ({}, {"num_ctx": 1024}, {"num_batch": 64}, {"num_thread": 2}):
        body = {"model": "written", "prompt": "hello", "stream": False, "options": {**_OPTIONS, **asked}}
        assert stage.post("/api/generate", body)["eval_count"] == 2
    assert _loads(routed) - before == 1
    stage.unload_all()
    stage.absent("written")
