"""Unmodified popular clients through the router."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from tests.support.ollama_server import ModelFile
from tests.support.product import Product
from tests.support.rawhttp import call
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.ollama

_OPTIONS = {"num_predict": 6, "seed": 1}
_HI = [{"role": "user", "content": "hi"}]


def _run(*command: str | Path, product: Product, cwd: Path | None = None) -> str:
    """Runs a command, which must succeed; returns its standard output."""
    environment = {**product.environment, "OLLAMA_HOST": product.address.url, "TERM": "dumb"}
    completed = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert completed.returncode == 0, (command, completed.stdout, completed.stderr)
    return completed.stdout


def test_curl_streams_a_chat(product: Product) -> None:
    body = json.dumps({"model": "tiny", "messages": _HI, "options": _OPTIONS})
    text = _run(
        "curl", "-sSN", "--fail", "--max-time", "300", product.address.url + "/api/chat", "-d", body, product=product
    )
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["done"] for line in lines] == [False] * 6 + [True]
    assert all(line["message"]["content"].strip() for line in lines[:-1])


def test_the_ollama_command_runs_a_model(product: Product, binary: Path) -> None:
    generated_words = _run(binary, "run", "short", "hello", product=product).split()
    assert len(generated_words) == 8


def test_the_ollama_command_lists_shows_and_stops(product: Product, binary: Path) -> None:
    _run(binary, "run", "short", "hello", product=product)
    assert "short:latest" in _run(binary, "list", product=product)
    assert "num_predict" in _run(binary, "show", "short", product=product)
    # `short` shares the weights of `tiny` and is listed under the name that loaded the runner
    (loaded,) = [
        line.split()[0] for line in _run(binary, "ps", product=product).splitlines() if _is_listed(product, line)
    ]
    _run(binary, "stop", loaded, product=product)

    def is_stopped() -> bool:
        return not [line for line in _run(binary, "ps", product=product).splitlines() if _is_listed(product, line)]

    eventually_sync(is_stopped, what="the end of the stopped model")


def _is_listed(product: Product, line: str) -> bool:
    return line.startswith(("short:latest", "tiny:latest"))


def test_the_ollama_command_creates_copies_and_removes(
    product: Product, binary: Path, files: Mapping[str, ModelFile], tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM {files['tiny'].path}\nPARAMETER num_thread 1\nSYSTEM be brief\n")
    _run(binary, "create", "made", "-f", "Modelfile", product=product, cwd=tmp_path)
    _run(binary, "cp", "made", "copied", product=product)
    listed = _run(binary, "list", product=product)
    assert "made:latest" in listed
    assert "copied:latest" in listed
    _run(binary, "rm", "made", "copied", product=product)
    assert "made:latest" not in _run(binary, "list", product=product)


def _untyped(client: Any) -> contextlib.AbstractContextManager[Any]:
    """The client as `Any`, because strict type checking cannot follow its types."""
    return client


def test_the_ollama_package_chats_generates_and_embeds(product: Product) -> None:
    with _untyped(ollama.Client(host=product.address.url)) as client:
        parts = list(client.chat("tiny", _HI, stream=True, options=_OPTIONS))
        assert [part.done for part in parts] == [False] * 6 + [True]
        assert client.generate("tiny", "hello", options=_OPTIONS).eval_count == 6
        assert [len(vector) for vector in client.embed("embed", ["a", "b"]).embeddings] == [64, 64]
        assert {model.model for model in client.list().models} >= {"tiny:latest", "embed:latest", "big:latest"}
        assert client.show("tiny").details.family == "llama"
        assert {model.model for model in client.ps().models} >= {"embed:latest"}
        with pytest.raises(ollama.ResponseError) as error:
            client.generate("nope", "x")
        assert error.value.status_code == 404


async def test_the_async_ollama_package_streams(product: Product) -> None:
    opened: Any = ollama.AsyncClient(host=product.address.url)
    async with opened as client:
        stream = await client.chat("tiny", _HI, stream=True, options=_OPTIONS)
        assert [part.done async for part in stream] == [False] * 6 + [True]


def test_the_openai_package_chats_completes_and_embeds(product: Product) -> None:
    with _untyped(openai.OpenAI(base_url=product.address.url + "/v1", api_key="unused", max_retries=0)) as client:
        options = {"include_usage": True}
        events = list(
            client.chat.completions.create(
                model="tiny",
                messages=_HI,
                max_tokens=5,
                seed=1,
                stream=True,
                stream_options=options,
            )
        )
        contents = [event.choices[0].delta.content for event in events if event.choices]
        assert len([content for content in contents if content]) == 5
        assert events[-1].usage.completion_tokens == 5
        unstreamed = client.chat.completions.create(model="tiny", messages=_HI, max_tokens=3)
        assert unstreamed.usage is not None
        assert unstreamed.usage.completion_tokens == 3
        text = client.completions.create(model="tiny", prompt="hi", max_tokens=3)
        assert text.choices[0].text.strip()
        vectors = client.embeddings.create(model="embed", input=["a", "b"], encoding_format="float")
        assert [len(item.embedding) for item in vectors.data] == [64, 64]
        assert {model.id for model in client.models.list()} >= {"tiny:latest", "embed:latest"}
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=_HI)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/generate", {"model": "nope", "prompt": "x"}, 404, "model 'nope' not found"),
        ("/api/chat", b"{bad", 400, "invalid character 'b' looking for beginning of object key string"),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
        ("/api/chat", {"messages": _HI}, 400, "model is required"),
        ("/api/embed", {"model": "nope", "input": "x"}, 404, 'model "nope" not found, try pulling it first'),
        ("/api/copy", {"source": "nope", "destination": "x"}, 404, 'model "nope" not found'),
        ("/api/generate", {"model": "embed", "prompt": "x"}, 400, '"embed" does not support generate'),
        (
            "/api/generate",
            {"model": "tiny", "prompt": "x", "options": {"num_ctx": "big"}},
            500,
            'option "num_ctx" must be of type integer',
        ),
    ],
)
async def test_error_messages_of_the_server_are_passed_through(
    product: Product, path: str, body: object, status: int, message: str
) -> None:
    reply = await call(product.address, "POST", path, body)
    assert (reply.status, reply.json()) == (status, {"error": message})


async def test_the_openai_api_returns_errors_in_its_format(product: Product) -> None:
    body = {"model": "nope", "messages": _HI}
    reply = await call(product.address, "POST", "/v1/chat/completions", body)
    assert reply.status == 404
    assert "nope" in reply.json()["error"]["message"]
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_stream_keeps_its_chunks(product: Product) -> None:
    body = {"model": "tiny", "prompt": "hello", "options": _OPTIONS}
    reply = await call(product.address, "POST", "/api/generate", body)
    assert (reply.end, reply.header("Content-Type")) == ("complete", "application/x-ndjson")
    assert all(chunk.endswith(b"\n") for chunk in reply.chunks)
    assert [line["done"] for line in reply.lines()] == [False] * 6 + [True]


@pytest.mark.parametrize("name", ["TINY", "library/tiny", "registry.ollama.ai/library/tiny:latest", "tiny:latest"])
async def test_every_form_of_a_name_works_and_is_echoed(product: Product, name: str) -> None:
    body = {"model": name, "prompt": "hello", "stream": False, "options": _OPTIONS}
    reply = await call(product.address, "POST", "/api/generate", body)
    assert (reply.status, reply.json()["model"]) == (200, name)


async def test_a_body_is_parsed_as_the_server_does(product: Product) -> None:
    body = b'{"model":null,"prompt":"x","stream":false,"MODEL":"tiny","options":{"num_predict":2}} more'
    reply = await call(product.address, "POST", "/api/generate", body)
    assert (reply.status, reply.json()["model"]) == (200, "tiny")
    reply = await call(product.address, "POST", "/api/generate", body.replace(b"null", b'"nope"'))
    assert (reply.status, reply.header("X-Llamayard-Error")) == (400, "bad_request")
