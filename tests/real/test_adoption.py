"""A router that is restarted, or killed, over real servers: they and what they have loaded stay."""

from __future__ import annotations

import signal

import pytest

from tests.real.conftest import MakeProduct
from tests.support.product import Product
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_SHORT = {"model": "big", "prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}


def _adopted(product: Product) -> set[str]:
    rows = product.call("GET", "/llamayard/status")[1]["instances"]
    return {row["name"] for row in rows if row["reason"].startswith("adopted")}


def _are_ready(product: Product) -> bool:
    return all(row["state"] == "ready" for row in product.call("GET", "/llamayard/status")[1]["instances"])


def _processes(product: Product) -> tuple[dict[int, int], set[int]]:
    """Pids of the servers by port, and of the runners."""
    servers = {port: server.pid for port, server in product.servers().items()}
    return servers, {runner.pid for runner in product.runners()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_servers_and_runners_stay_and_are_used(make_product: MakeProduct, number: signal.Signals) -> None:
    product = make_product(ollama={"adopt": True})
    product.start()
    assert product.call("POST", "/api/generate", _SHORT)[0] == 200
    eventually_sync(lambda: _are_ready(product), what="both servers")
    before, answer = _processes(product), product.call("POST", "/api/generate", _SHORT)[1]["response"]
    assert len(before[1]) == 1
    product.signal(number)
    product.wait()
    product.start()
    assert _adopted(product) == {"a", "b"}
    assert [model["name"] for model in product.call("GET", "/llamayard/status")[1]["models"]] == ["big:latest"]
    status, again = product.call("POST", "/api/generate", _SHORT)
    assert (status, again["response"]) == (200, answer)
    assert _processes(product) == before
    product.signal(signal.SIGINT)
    assert product.wait() == 0
    assert product.processes() == []
