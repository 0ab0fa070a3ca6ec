"""Aliases, fallbacks, clouds, layouts, options and who asks, through the router over real servers."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import two_instances
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama

_SHORT = {"prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}
_HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def ruled(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    rules = {
        "aliases": {"gpt-4o": "tiny", "Fast": "short:latest"},
        "fallbacks": {"lost": {"to": ["gone", "tiny"], "reasons": ["unknown_model"]}},
        "models": {"other": {"options": "pass"}},
        "server": {"list_aliases": True},
    }
    config = {**two_instances(binary, store), **rules}
    with running(prepare(tmp_path_factory.mktemp("ruled"), config)) as product:
        yield product


async def _generate(product: Product, model: str, headers: tuple[tuple[str, str], ...] = (), **fields: Any) -> Reply:
    return await call(product.address, "POST", "/api/generate", {"model": model, **_SHORT, **fields}, headers)


async def test_an_alias_answers_as_its_model_on_every_api(ruled: Product) -> None:
    reply = await _generate(ruled, "GPT-4o:latest")
    assert (reply.status, reply.json()["model"], reply.header("X-Llamayard-Model")) == (200, "tiny", "tiny")
    chat = {"model": "gpt-4o", "messages": _HI, "max_tokens": 2}
    assert (await call(ruled.address, "POST", "/v1/chat/completions", chat)).json()["usage"]["completion_tokens"] == 2
    assert (await call(ruled.address, "POST", "/api/show", {"model": "gpt-4o"})).json()["details"]["family"] == "llama"
    assert (await call(ruled.address, "POST", "/api/show", {"name": "gpt-4o"})).status == 200
    assert (await call(ruled.address, "GET", "/v1/models/gpt-4o")).json()["id"] == "tiny"


async def test_aliases_are_listed_as_models_where_that_was_asked_for(ruled: Product, product: Product) -> None:
    rows = {row["name"]: row for row in (await call(ruled.address, "GET", "/api/tags")).json()["models"]}
    assert rows["gpt-4o"]["llamayard"] == {"alias_of": "tiny"}
    assert rows["gpt-4o"]["digest"] == rows["tiny:latest"]["digest"]
    assert {row["id"] for row in (await call(ruled.address, "GET", "/v1/models")).json()["data"]} >= {"gpt-4o", "Fast"}
    plain = (await call(product.address, "GET", "/api/tags")).json()["models"]
    assert not any("gpt" in row["name"] for row in plain)


async def test_a_fallback_is_told_in_headers(ruled: Product) -> None:
    reply = await _generate(ruled, "lost")
    assert (reply.status, reply.json()["model"]) == (200, "tiny")
    assert reply.header("X-Llamayard-Fallback") == "unknown_model"
    assert reply.header("X-Llamayard-Model") == "tiny"
    missing = await _generate(ruled, "gone")
    assert (missing.status, missing.json(), missing.header("X-Llamayard-Model")) == (
        404, {"error": "model 'gone' not found"}, None,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["/api/chat", "/api/show", "/api/pull", "/v1/chat/completions", "/v1/embeddings"])
async def test_cloud_models_are_refused_with_why(product: Product, path: str) -> None:
    reply = await call(product.address, "POST", path, {"model": "tiny:cloud", "messages": _HI})
    assert reply.status == 403
    assert "ollama.cloud" in str(reply.json()["error"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/me"),
        ("POST", "/api/signout"),
        ("DELETE", "/api/user/keys/abc"),
        ("POST", "/api/experimental/web_search"),
        ("POST", "/api/experimental/web_fetch"),
    ],
)
async def test_what_acts_on_the_servers_account_is_refused_with_why(product: Product, method: str, path: str) -> None:
    reply = await call(product.address, method, path, {})
    assert (reply.status, "ollama.com account" in reply.json()["error"]) == (403, True)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/status"),
        ("GET", "/api/experimental/model-recommendations"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/audio/transcriptions"),
    ],
)
async def test_what_this_version_lacks_is_its_own_404(product: Product, method: str, path: str) -> None:
    reply = await call(product.address, method, path, {"model": "tiny"} if method == "POST" else None)
    assert (reply.status, reply.body, reply.header("Content-Type")) == (404, b"404 page not found", "text/plain")


async def test_an_api_that_this_version_lacks_is_named_with_the_version(product: Product) -> None:
    responses = await call(product.address, "POST", "/v1/responses", {"model": "tiny", "input": "x"})
    words = responses.json()["error"]["message"]
    assert (responses.status, "0.11.4" in words, "/v1/responses" in words) == (404, True, True)
    messages = await call(product.address, "POST", "/v1/messages", {"model": "tiny", "messages": _HI, "max_tokens": 2})
    assert (messages.status, messages.json()["type"]) == (404, "error")
    assert "/v1/messages" in messages.json()["error"]["message"]
    assert not any("/v1/messages" in name for names in product.resident().values() for name in names)


async def test_a_layout_that_cannot_be_had_is_refused_with_why(product: Product) -> None:
    reply = await _generate(product, "tiny", (("X-Llamayard-Layout", "gpu:0"),))
    assert (reply.status, reply.header("X-Llamayard-Error")) == (409, "layout_unavailable")
    assert "no GPU '0'" in reply.json()["error"]
    assert (await _generate(product, "tiny", (("X-Llamayard-Layout", "left"),))).status == 400


def _contexts(product: Product, name: str) -> list[int]:
    rows = product.call("GET", "/api/ps")[1]["models"]
    return [row["context_length"] for row in rows if row["name"] == name]


async def test_a_smaller_context_does_not_reload_a_protected_model(ruled: Product) -> None:
    assert (await _generate(ruled, "big")).status == 200
    (before,) = [process.pid for process in ruled.runners() if _has(ruled, process, "big")]
    for size in (512, 1024, 2048):
        reply = await _generate(ruled, "big", options={"num_ctx": size, "num_predict": 2, "num_gpu": 0})
        assert reply.status == 200
        assert reply.header("X-Llamayard-Dropped-Options") == "num_gpu"
    assert [process.pid for process in ruled.runners() if _has(ruled, process, "big")] == [before]
    assert _contexts(ruled, "big:latest") == [8192]


def _has(product: Product, process: Any, model: str) -> bool:
    blob = next(
        one["blob"] for one in product.call("GET", "/llamayard/status")[1]["models"] if one["name"].startswith(model)
    )
    return any(blob.removeprefix("sha256:") in part for part in process.cmdline())


async def test_a_model_that_passes_options_gets_the_context_that_was_asked_for(ruled: Product) -> None:
    reply = await _generate(ruled, "other", options={"num_ctx": 1024, "num_predict": 2, "num_gpu": 0})
    assert (reply.status, reply.header("X-Llamayard-Dropped-Options")) == (200, None)
    assert _contexts(ruled, "other:latest") == [1024]


async def test_who_asks_stands_in_the_log_without_the_key(ruled: Product) -> None:
    headers = (("Authorization", "Bearer sk-very-secret"), ("X-OpenWebUI-User-Id", "anna"), ("X-Request-ID", "my-id"))
    reply = await _generate(ruled, "tiny", headers)
    assert (reply.status, reply.header("X-Request-ID")) == (200, "my-id")

    def line() -> dict[str, Any] | None:
        found = [text for text in ruled.log_text().splitlines() if '"my-id"' in text]
        return json.loads(found[-1]) if found else None

    entry = await eventually(line)
    assert entry is not None
    assert entry["client"].startswith("key:")
    assert entry["client"].endswith("/user:anna")
    assert "very-secret" not in ruled.log_text()
    assert len((await _generate(ruled, "tiny")).header("X-Request-ID") or "") == 32
