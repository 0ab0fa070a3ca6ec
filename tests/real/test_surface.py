"""The router's own endpoints and the aggregated ones."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.product import Product
from tests.support.rawhttp import call

pytestmark = pytest.mark.ollama

_SHORT = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2}}


async def test_health_and_readiness(product: Product) -> None:
    assert (await call(product.address, "GET", "/health")).status == 200
    assert (await call(product.address, "GET", "/ready")).status == 200
    root = await call(product.address, "GET", "/")
    assert (root.status, root.body) == (200, b"Ollama is running")
    assert (await call(product.address, "HEAD", "/")).status == 200
    assert (await call(product.address, "GET", "/api/version")).json()["version"]


async def test_tags_lists_each_model_once(product: Product) -> None:
    models = (await call(product.address, "GET", "/api/tags")).json()["models"]
    names = [model["name"] for model in models]
    assert len(names) == len(set(names))
    assert set(names) >= {"tiny:latest", "other:latest", "big:latest", "embed:latest", "short:latest"}
    for model in models:
        assert {"name", "model", "modified_at", "size", "digest", "details"} <= set(model)


async def test_ps_lists_the_loaded_models_of_all_instances(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", _SHORT)
    await call(product.address, "POST", "/api/embed", {"model": "embed", "input": "x"})
    models = (await call(product.address, "GET", "/api/ps")).json()["models"]
    assert {"embed:latest"} <= {model["name"] for model in models}
    assert len({(model["name"], model["llamayard"]["instance"]) for model in models}) == len(models)
    for model in models:
        assert {"name", "model", "size", "digest", "details", "expires_at", "size_vram"} <= set(model)


async def test_status_names_instances_and_their_states(product: Product) -> None:
    status = (await call(product.address, "GET", "/llamayard/status")).json()
    instances = {instance["name"]: instance for instance in status["instances"]}
    assert set(instances) == {"a", "b"}
    assert {instance["state"].upper() for instance in instances.values()} == {"READY"}
    assert "queue" in status


async def test_metrics_count_requests(product: Product) -> None:
    await call(product.address, "POST", "/api/generate", _SHORT)
    reply = await call(product.address, "GET", "/metrics")
    assert reply.status == 200
    families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    assert all(name.startswith(("llamayard_", "python_", "process_")) for name in families)
    request_families = [family for name, family in families.items() if name == "llamayard_requests"]
    assert request_families
    assert sum(sample.value for sample in request_families[0].samples if sample.name.endswith("_total")) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/debug/pprof/", 404),
        ("GET", "/nope", 404),
        ("POST", "/api/nope", 404),
        ("GET", "/api/chat", 405),
        ("POST", "/api/tags", 405),
        ("GET", "/v1/nope", 404),
    ],
)
async def test_unknown_paths_and_wrong_methods_are_refused(
    product: Product, method: str, path: str, status: int
) -> None:
    assert (await call(product.address, method, path)).status == status


async def test_foreign_hosts_and_origins_are_refused(product: Product) -> None:
    assert (await call(product.address, "GET", "/api/tags", host="evil.example")).status == 403
    assert (await call(product.address, "GET", "/api/tags", headers=(("Origin", "http://evil.example"),))).status == 403
    allowed = await call(product.address, "GET", "/api/tags", headers=(("Origin", "http://localhost:3000"),))
    assert (allowed.status, allowed.header("Access-Control-Allow-Origin")) == (200, "http://localhost:3000")
