"""The whole program's HTTP: errors, refusals, encodings, targets and hang-ups, alike on all kinds of routes."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call, connect, exchange, request_bytes
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
    config = {"log": {"format": "json"}, "poll": {"catalog_seconds": 0.2}}
    environment = {"LLAMAYARD_RIG_SPEED": "20"}
    with running(prepare(tmp_path_factory.mktemp("rig"), config, environment, ("--rig", "1x3090"))) as router:
        (store,) = {process.environ()["OLLAMA_MODELS"] for process in router.servers().values()}
        put_into_store(Path(store), "small", LLAMA_8B)
        yield router


def _log_lines(product: Product, request_id: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in product.log_text().splitlines() if f'"{request_id}"' in line]
    return [line for line in lines if line["event"] == "request"]


async def _logged(product: Product, request_id: str) -> dict[str, Any]:
    await eventually(lambda: _log_lines(product, request_id), what=f"the log line of {request_id}")
    (line,) = _log_lines(product, request_id)
    return line


def _rejections(product: Product, code: str) -> float:
    text = product.call("GET", "/metrics")[1].decode()
    name = f'llamayard_rejections_total{{code="{code}"}} '
    return next(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


async def _ask(product: Product, method: str, path: str, body: Any, *headers: tuple[str, str]) -> Reply:
    return await call(product.address, method, path, body, headers)


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/tags"), ("POST", "/api/chat"), ("POST", "/v1/messages")])
@pytest.mark.parametrize(("header", "value"), [("Host", "evil.example"), ("Origin", "http://evil.example")])
async def test_a_refused_host_or_origin_is_named_in_the_log(
    product: Product, method: str, path: str, header: str, value: str
) -> None:
    before, request_id = _rejections(product, "forbidden"), f"{header}-{path.replace('/', '-')}"
    host = value if header == "Host" else "localhost"
    origin = (("Origin", value),) if header == "Origin" else ()
    raw = request_bytes(method, path, b"{}", (("X-Request-ID", request_id), *origin), host)
    reply = await exchange(product.address, raw)
    assert (reply.status, reply.body, reply.header("X-Llamayard-Error")) == (403, b"", "forbidden")
    line = await _logged(product, request_id)
    assert (line["error"], line["status"]) == ("forbidden", 403)
    assert line["refused"].startswith(f"{header} '{value}' (server.")
    assert _rejections(product, "forbidden") == before + 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/api/chat", {"model": "nope"}, 404, "model_not_found"),
        ("POST", "/v1/chat/completions", {**_CHAT, "model": "nope"}, 404, "model_not_found"),
        ("POST", "/api/show", {"model": "nope"}, 404, "model_not_found"),
        ("GET", "/v1/models/nope", None, 404, "model_not_found"),
        ("DELETE", "/api/delete", {"model": "nope"}, 404, "model_not_found"),
        ("POST", "/api/copy", {"source": "nope", "destination": "x"}, 404, "model_not_found"),
        ("POST", "/api/chat", b"{bad", 400, "bad_request"),
        ("POST", "/v1/messages", b"{bad", 400, "bad_request"),
        ("POST", "/api/show", b"{bad", 400, "bad_request"),
        ("POST", "/api/pull", b"{bad", 400, "bad_request"),
        ("POST", "/api/chat", {"messages": []}, 400, "bad_request"),
        ("POST", "/api/chat", b'{"model":"small","Model":"nope"}', 400, "bad_request"),
        ("POST", "/api/show", b'{"model":"small","Model":"nope"}', 400, "bad_request"),
        ("DELETE", "/api/delete", b'{"model":"small","Model":"nope"}', 400, "bad_request"),
        ("POST", "/api/copy", b'{"source":"a","SOURCE":"b","destination":"c"}', 400, "bad_request"),
    ],
)
async def test_errors_of_clients_have_a_code_and_are_counted(
    product: Product, method: str, path: str, body: Any, status: int, code: str
) -> None:
    before = _rejections(product, code)
    reply = await _ask(product, method, path, body)
    assert (reply.status, reply.header("X-Llamayard-Error")) == (status, code)
    assert b'"error"' in reply.body
    assert _rejections(product, code) == before + 1


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/api/generate", {"model": "small", "prompt": "hi", "options": {"num_predict": 2}}, "no"),
        ("/v1/chat/completions", {**_CHAT, "stream": True}, "no"),
        ("/api/pull", {"model": "nope"}, "no"),
        ("/v1/chat/completions", _CHAT, None),
        ("/api/show", {"model": "small"}, None),
    ],
)
async def test_streams_ask_proxies_not_to_buffer_them(product: Product, path: str, body: Any, expected: str) -> None:
    reply = await _ask(product, "POST", path, body)
    assert (reply.status, reply.header("X-Accel-Buffering")) == (200, expected)


async def test_a_compressed_body_is_answered_like_a_plain_one(product: Product) -> None:
    for model, status in (("small", 200), ("nope", 404)):
        packed = zstandard.ZstdCompressor().compress(json.dumps({**_CHAT, "model": model}).encode())
        reply = await _ask(product, "POST", "/v1/chat/completions", packed, ("Content-Encoding", "zstd"))
        assert reply.status == status
    assert (await _ask(product, "GET", "/v1/models", None, ("Content-Encoding", "zstd"))).status == 200


@pytest.mark.parametrize("target", ["/api/version", "/api/tags", "/v1/models/small", "/health", "/metrics"])
async def test_targets_in_absolute_form_are_served(product: Product, target: str) -> None:
    raw = f"GET http://{product.address.host}:{product.address.port}{target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert (await exchange(product.address, raw.encode())).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/generate"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/api/show"),
        ("POST", "/api/pull"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("POST", "/api/push"),
        ("DELETE", "/api/delete"),
        ("POST", f"/api/blobs/sha256:{'0' * 64}"),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_client_that_hangs_up_within_its_body_is_logged_as_gone(
    product: Product, method: str, path: str, framing: str
) -> None:
    request_id = f"gone{path}-{framing[:4]}".replace("/", "-").replace(":", "-")
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {request_id}\r\n{framing}\r\n\r\n"
    async with connect(product.address) as connection:
        await connection.send(head.encode() + b'5\r\n{"mod\r\n')
    line = await _logged(product, request_id)
    assert (line["status"], line.get("error")) == (499, None)
