"""A large model is loaded while nothing is requested, and gives way: real processes on emulated GPUs and servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, prepare, running
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

_LARGE, _SMALL, _OTHER = "llama3.3:70b", "llama3.1:8b", "qwen2.5:14b"


def _ask(product: Product, name: str) -> None:
    request = {"model": name, "prompt": "hi", "stream": False, "options": {"num_predict": 1}}
    assert product.call("POST", "/api/generate", request)[0] == 200


def _row(product: Product, name: str) -> dict[str, Any] | None:
    rows = product.call("GET", "/llamayard/status")[1]["models"]
    return next((row for row in rows if row["name"] == name), None)


def _is(product: Product, name: str, state: str) -> bool:
    row = _row(product, name)
    return row is not None and row["state"] == state


def test_an_unasked_load_is_broken_off_for_a_request_and_begins_again_later(tmp_path: Path) -> None:
    placement = {"rest": "auto", "rest_weight": 1, "ttft_target_seconds": 1.0}
    config: dict[str, Any] = {"log": {"format": "json"}, "placement": placement}
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "5"}, ("--rig", "2x3090"))) as product:
        for name in (_LARGE, _LARGE, _LARGE, _SMALL):
            _ask(product, name)
        eventually_sync(lambda: _is(product, _LARGE, "loading"), what="the load of the large model")
        _ask(product, _OTHER)
        eventually_sync(lambda: _is(product, _LARGE, "ready"), what="the large model")
        row = _row(product, _LARGE)
        events = [json.loads(line) for line in product.log_text().splitlines() if line.startswith("{")]
    assert row is not None
    assert "unasked" in row["reason"]
    names = [event["event"] for event in events]
    assert names.count("load_broken_off") == 1
    assert "load_failed" not in names
    assert "unload_failed" not in names
