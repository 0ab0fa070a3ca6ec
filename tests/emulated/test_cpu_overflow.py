"""Small models on the CPU while a large one holds the GPUs: real processes on emulated GPUs and servers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import blocking_call
from tests.support.product import Product, prepare, running
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

_LARGE, _SMALL = "llama3.3:70b", "llama3.2:3b"


def _ask(product: Product, name: str, tokens: int = 1) -> None:
    request = {"model": name, "prompt": "hi", "stream": False, "options": {"num_predict": tokens}}
    assert product.call("POST", "/api/generate", request)[0] == 200


def _rows(product: Product, name: str) -> dict[str, dict[str, Any]]:
    rows = product.call("GET", "/llamayard/status")[1]["models"]
    return {row["instance"]: row for row in rows if row["name"] == name}


def _copied(product: Product) -> bool:
    row = _rows(product, _SMALL).get("cpu-overflow")
    return row is not None and row["state"] == "ready"


def test_a_small_model_is_served_on_the_cpu_while_a_large_one_answers(tmp_path: Path) -> None:
    config: dict[str, Any] = {"log": {"format": "json"}, "placement": {"cpu": "overflow"}}
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "5"}, ("--rig", "2x3090"))) as product:
        for _ in range(2):
            _ask(product, _SMALL)
        eventually_sync(lambda: _copied(product), what="the copy on the CPU")
        answer = threading.Thread(target=_ask, args=(product, _LARGE, 600))
        answer.start()
        eventually_sync(
            lambda: any(row["in_flight"] for row in _rows(product, _LARGE).values()), what="the answer of the large one"
        )
        shown = product.call("GET", f"/llamayard/explain?model={_SMALL}")[1]
        _ask(product, _SMALL)
        assert any(row["in_flight"] for row in _rows(product, _LARGE).values()), "the large one has been interrupted"
        answer.join()
        metrics = blocking_call(product.address, "GET", "/metrics")[1]
        lines = [json.loads(line) for line in product.log_text().splitlines() if line.startswith("{")]
    assert (shown["outcome"], shown["instance"]) == ("serve", "cpu-overflow")
    assert "on the CPU meanwhile" in shown["reason"]
    served = [line for line in lines if line["event"] == "request" and line.get("model") == _SMALL]
    assert [line["instance"] for line in served].count("cpu-overflow") == 1
    assert served[-1]["instance"] == "cpu-overflow"
    assert 'instance="cpu-overflow"' in str(metrics)
