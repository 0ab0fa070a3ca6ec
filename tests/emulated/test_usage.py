"""Usage of the whole product: written while it runs, kept when it is killed."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from router.domain.usage import UsageTotals, summarize
from router.storage.usage_store import read_usage
from tests.support.product import Product, prepare, running
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.rig

_MODEL = "llama3.1:8b"


@pytest.fixture
def product(tmp_path: Path) -> Generator[Product]:
    config = {"usage": {"enabled": True}}
    with running(prepare(tmp_path, config, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", "3090"))) as router:
        yield router


def _ask(product: Product, times: int) -> None:
    body = {"model": _MODEL, "prompt": "hi", "stream": False, "options": {"num_predict": 8}}
    for _ in range(times):
        assert product.call("POST", "/api/generate", body)[0] == 200


def _total(product: Product) -> UsageTotals:
    rows = read_usage(product.config.parent / "state" / "usage.sqlite", "2000-01-01")
    return summarize(rows, ("model",)).get((_MODEL,), UsageTotals())


def test_usage_survives_a_killed_router_and_is_complete_after_a_stopped_one(product: Product) -> None:
    _ask(product, 3)
    eventually_sync(lambda: _total(product).requests == 3, what="three requests in the database")
    product.signal(signal.SIGKILL)
    product.wait()
    used = _total(product)
    assert (used.requests, used.output_tokens) == (3, 24)
    assert used.gpu_seconds > 0.0
    assert used.energy_wh > 0.0
    product.start()
    _ask(product, 2)
    product.signal(signal.SIGTERM)
    assert product.wait() == 0
    assert _total(product).requests == 5
