"""A model is loaded once for its first request, whatever runner parameters its Modelfile sets."""

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


def _load_count(routed: Routed) -> int:
    text = routed.behind.log.read_text(errors="replace")
    return text.count('msg="starting llama-server"' if routed.behind.is_0_30 else "llama runner started")


@pytest.mark.parametrize("parameters", _PARAMETERS, ids=str)
def test_a_cold_model_is_loaded_once_and_serves_later_requests(routed: Routed, parameters: dict[str, Any]) -> None:
    stage = routed.stage
    stage.post("/api/create", {"model": "written", "from": "tiny", "parameters": parameters, "stream": False})
    stage.unload_all()
    loads_before = _load_count(routed)
    for requested_options in ({}, {"num_ctx": 1024}, {"num_batch": 64}, {"num_thread": 2}):
        body = {"model": "written", "prompt": "hello", "stream": False, "options": {**_OPTIONS, **requested_options}}
        assert stage.post("/api/generate", body)["eval_count"] == 2
    assert _load_count(routed) - loads_before == 1
    stage.unload_all()
    stage.ensure_absent("written")
