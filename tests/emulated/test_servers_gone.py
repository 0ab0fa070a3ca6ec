"""In the first second after a server is gone, requests come to it although nobody knows yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ollama_server import OllamaServer, emulated_server
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Reply, call
from tests.support.sparse_model import LLAMA_8B, put_into_store
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig

_KNOWN, _UNKNOWN = {"model": "held"}, {"model": "nobody-has-it"}
_BLOB = f"/api/blobs/sha256:{'0' * 64}"
_REQUESTS: tuple[tuple[str, str, Any], ...] = (
    *(("POST", path, model) for path in ("/api/show", "/api/generate", "/api/push") for model in (_KNOWN, _UNKNOWN)),
    *(("GET", f"/v1/models/{model['model']}", None) for model in (_KNOWN, _UNKNOWN)),
    *(("GET", path, None) for path in ("/api/tags", "/v1/models", "/api/status")),
    ("POST", "/v1/chat/completions", {**_KNOWN, "messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/api/embed", {**_KNOWN, "options": {"num_ctx": "many"}}),
    ("DELETE", "/api/delete", _UNKNOWN),
    ("POST", "/api/copy", {"source": "held", "destination": "copy"}),
    ("POST", "/api/create", {"model": "made", "from": "held"}),
    ("POST", "/api/pull", _KNOWN),
    ("HEAD", _BLOB, None),
    ("POST", _BLOB, b"x"),
)


@contextlib.contextmanager
def _fleet(folder: Path, names: tuple[str, ...]) -> Generator[tuple[Product, list[OllamaServer]]]:
    """A router and the servers that are attached to it, which all have the model."""
    with contextlib.ExitStack() as stack:
        servers: list[OllamaServer] = []
        for name in names:
            (folder / name).mkdir()
            servers.append(stack.enter_context(emulated_server(folder / name)))
            put_into_store(servers[-1].models_dir, "held", LLAMA_8B)
        instances = [{"name": name, "url": server.url} for name, server in zip(names, servers, strict=True)]
        yield stack.enter_context(running(prepare(folder, {"instances": instances}))), servers


async def _ask(product: Product, request: tuple[str, str, Any]) -> Reply:
    return await call(product.address, *request)


async def test_every_route_says_when_to_come_back(tmp_path: Path) -> None:
    with _fleet(tmp_path, ("only",)) as (product, (server,)):
        assert (await _ask(product, _REQUESTS[0])).status == 200
        server.stop()
        replies = await asyncio.gather(*(_ask(product, request) for request in _REQUESTS))
    answers = {
        (request[:2], reply.status, int(reply.header("Retry-After") or 0) > 0, reply.header("X-Llamayard-Error"))
        for request, reply in zip(_REQUESTS, replies, strict=True)
    }
    assert answers == {(request[:2], 503, True, "no_instance") for request in _REQUESTS}


async def test_another_server_that_has_the_model_is_asked(tmp_path: Path) -> None:
    with _fleet(tmp_path, ("first", "second")) as (product, servers):

        def is_known_of_both() -> bool:
            rows = product.call("GET", "/api/tags")[1]["models"]
            return any(row["name"] == "held:latest" for row in rows) and product.log_text().count("ready") >= 2

        await eventually(is_known_of_both, what="both servers")
        assert (await _ask(product, _REQUESTS[0])).status == 200
        servers[0].stop()
        shown = await asyncio.gather(
            _ask(product, ("POST", "/api/show", _KNOWN)), _ask(product, ("GET", "/v1/models/held", None))
        )
        assert [reply.status for reply in shown] == [200, 200]
