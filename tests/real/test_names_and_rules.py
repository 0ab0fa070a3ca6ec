"""Aliases, fallbacks, cloud models, layouts, options and client identity, through the router with real servers."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import two_instances
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address, Reply, call
from tests.support.waiting import eventually

pytestmark = pytest.mark.ollama

_SHORT = {"prompt": "x", "stream": False, "options": {"num_predict": 2, "seed": 1}}
_HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def configured(binary: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
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


async def test_an_alias_works_as_its_model_on_every_api(configured: Product) -> None:
    reply = await _generate(configured, "GPT-4o:latest")
    assert (reply.status, reply.json()["model"], reply.header("X-Llamayard-Model")) == (200, "tiny", "tiny")
    chat = {"model": "gpt-4o", "messages": _HI, "max_tokens": 2}
    assert (await call(configured.address, "POST", "/v1/chat/completions", chat)).json()["usage"][
        "completion_tokens"
    ] == 2
    assert (await call(configured.address, "POST", "/api/show", {"model": "gpt-4o"})).json()["details"][
        "family"
    ] == "llama"
    assert (await call(configured.address, "POST", "/api/show", {"name": "gpt-4o"})).status == 200
    assert (await call(configured.address, "GET", "/v1/models/gpt-4o")).json()["id"] == "tiny"


async def test_aliases_are_listed_as_models_if_configured(configured: Product, product: Product) -> None:
    rows = {row["name"]: row for row in (await call(configured.address, "GET", "/api/tags")).json()["models"]}
    assert rows["gpt-4o"]["llamayard"] == {"alias_of": "tiny"}
    assert rows["gpt-4o"]["digest"] == rows["tiny:latest"]["digest"]
    assert {row["id"] for row in (await call(configured.address, "GET", "/v1/models")).json()["data"]} >= {
        "gpt-4o",
        "Fast",
    }
    unconfigured_rows = (await call(product.address, "GET", "/api/tags")).json()["models"]
    assert not any("gpt" in row["name"] for row in unconfigured_rows)


async def test_a_fallback_is_reported_in_headers(configured: Product) -> None:
    reply = await _generate(configured, "lost")
    assert (reply.status, reply.json()["model"]) == (200, "tiny")
    assert reply.header("X-Llamayard-Fallback") == "unknown_model"
    assert reply.header("X-Llamayard-Model") == "tiny"
    missing = await _generate(configured, "gone")
    assert (missing.status, missing.json(), missing.header("X-Llamayard-Model")) == (
        404, {"error": "model 'gone' not found"}, None,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["/api/chat", "/api/show", "/api/pull", "/v1/chat/completions", "/v1/embeddings"])
async def test_cloud_models_are_refused_with_the_reason(product: Product, path: str) -> None:
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
async def test_endpoints_of_the_servers_account_are_refused_with_the_reason(
    product: Product, method: str, path: str
) -> None:
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
async def test_endpoints_missing_in_a_version_get_its_404(
    product: Product, version: str, method: str, path: str
) -> None:
    reply = await call(product.address, method, path, {"model": "tiny"} if method == "POST" else None)
    if version == "0.11.4" or path == "/v1/images/generations":
        assert (reply.status, reply.body, reply.header("Content-Type")) == (404, b"404 page not found", "text/plain")
    else:
        assert reply.status == (400 if method == "POST" else 200)


async def test_the_error_for_an_api_missing_in_this_version_names_the_version(product: Product, version: str) -> None:
    if version != "0.11.4":
        pytest.skip("this version has all APIs")
    responses = await call(product.address, "POST", "/v1/responses", {"model": "tiny", "input": "x"})
    message = responses.json()["error"]["message"]
    assert (responses.status, "0.11.4" in message, "/v1/responses" in message) == (404, True, True)
    messages = await call(product.address, "POST", "/v1/messages", {"model": "tiny", "messages": _HI, "max_tokens": 2})
    assert (messages.status, messages.json()["type"]) == (404, "error")
    assert "/v1/messages" in messages.json()["error"]["message"]
    assert not any("/v1/messages" in name for names in product.resident().values() for name in names)


async def test_an_unavailable_layout_is_refused_with_the_reason(product: Product) -> None:
    reply = await _generate(product, "tiny", (("X-Llamayard-Layout", "gpu:0"),))
    assert (reply.status, reply.header("X-Llamayard-Error")) == (409, "layout_unavailable")
    assert "no GPU '0'" in reply.json()["error"]
    assert (await _generate(product, "tiny", (("X-Llamayard-Layout", "left"),))).status == 400


def _contexts(product: Product, name: str) -> list[int]:
    rows = product.call("GET", "/api/ps")[1]["models"]
    return [row["context_length"] for row in rows if row["name"] == name]


async def test_a_smaller_context_does_not_reload_a_protected_model(configured: Product) -> None:
    assert (await _generate(configured, "big")).status == 200
    (runner_pid,) = [process.pid for process in configured.runners() if _holds_model(configured, process, "big")]
    for size in (512, 1024, 2048):
        reply = await _generate(configured, "big", options={"num_ctx": size, "num_predict": 2, "num_gpu": 0})
        assert reply.status == 200
        assert reply.header("X-Llamayard-Dropped-Options") == "num_gpu"
    assert [process.pid for process in configured.runners() if _holds_model(configured, process, "big")] == [runner_pid]
    assert _contexts(configured, "big:latest") == [8192]


def _holds_model(product: Product, process: Any, model: str) -> bool:
    blob = next(
        row["blob"] for row in product.call("GET", "/llamayard/status")[1]["models"] if row["name"].startswith(model)
    )
    return any(blob.removeprefix("sha256:") in part for part in process.cmdline())


async def test_a_model_that_passes_options_gets_the_requested_context(configured: Product) -> None:
    reply = await _generate(configured, "other", options={"num_ctx": 1024, "num_predict": 2, "num_gpu": 0})
    assert (reply.status, reply.header("X-Llamayard-Dropped-Options")) == (200, None)
    assert _contexts(configured, "other:latest") == [1024]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings"])
@pytest.mark.parametrize("name", ["num_ctx", "num_batch", "num_thread", "num_gpu", "main_gpu", "use_mmap"])
async def test_an_option_of_the_wrong_type_is_answered_as_by_a_server(product: Product, path: str, name: str) -> None:
    assert (await _generate(product, "tiny")).status == 200
    body = {"model": "tiny", "prompt": "x", "input": "x", "messages": _HI, "options": {name: "32"}}
    direct = await call(Address("127.0.0.1", next(iter(product.servers()))), "POST", path, body)
    routed = await call(product.address, "POST", path, body)
    assert direct.status == 500
    assert (routed.status, routed.json()) == (direct.status, direct.json())
    assert routed.header("X-Llamayard-Dropped-Options") is None


@pytest.mark.parametrize("fields", [{}, {"truncate": False}])
async def test_a_text_to_embed_is_cut_to_the_context_that_its_request_names(
    product: Product, fields: dict[str, Any]
) -> None:
    text = {"model": "embed", "input": ["short", "a text of more tokens than that. " * 10]}
    whole = await call(product.address, "POST", "/api/embed", text)
    cut = {**text, **fields, "options": {"num_ctx": 64}}
    routed = await call(product.address, "POST", "/api/embed", cut)
    direct = await call(Address("127.0.0.1", next(iter(product.servers()))), "POST", "/api/embed", cut)
    assert (whole.status, routed.status) == (200, direct.status)
    assert routed.json().get("embeddings") == direct.json().get("embeddings")
    assert routed.json().get("prompt_eval_count") == direct.json().get("prompt_eval_count")
    assert whole.json()["prompt_eval_count"] > routed.json().get("prompt_eval_count", 0)


@pytest.mark.parametrize("number", ["-1", "0", "1", "1.5", "3", "4", "1e300", "9223372036854775807", '"4"', "null"])
@pytest.mark.parametrize("text", ["a b", "more tokens than the least context holds"])
async def test_contexts_that_hold_no_text_are_answered_as_by_a_server(product: Product, number: str, text: str) -> None:
    requests = [("/api/embed", "input", more) for more in ("", ', "truncate": false')]
    for path, key, more in (*requests, ("/api/embeddings", "prompt", "")):
        body = f'{{"model": "embed", "{key}": "{text}", "options": {{"num_ctx": {number}}}{more}}}'.encode()
        routed = await call(product.address, "POST", path, body)
        direct = await call(Address("127.0.0.1", next(iter(product.servers()))), "POST", path, body)
        fields = ("error", "prompt_eval_count", "embeddings", "embedding")
        documents = [reply.json() if reply.body else {} for reply in (routed, direct)]  # 0.11.4 crashes without words
        assert routed.status == direct.status, (path, more)
        found, expected = ([document.get(name) for name in fields] for document in documents)
        assert found == expected, (path, more)


async def test_the_client_identity_is_logged_without_the_key(configured: Product) -> None:
    headers = (("Authorization", "Bearer sk-very-secret"), ("X-OpenWebUI-User-Id", "anna"), ("X-Request-ID", "my-id"))
    reply = await _generate(configured, "tiny", headers)
    assert (reply.status, reply.header("X-Request-ID")) == (200, "my-id")

    def log_entry() -> dict[str, Any] | None:
        lines = [text for text in configured.log_text().splitlines() if '"my-id"' in text]
        return json.loads(lines[-1]) if lines else None

    entry = await eventually(log_entry)
    assert entry is not None
    assert entry["client"].startswith("key:")
    assert entry["client"].endswith("/user:anna")
    assert "very-secret" not in configured.log_text()
    assert len((await _generate(configured, "tiny")).header("X-Request-ID") or "") == 32
