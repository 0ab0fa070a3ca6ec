"""Equivalent model names, body parsing, and the errors of both."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.stage import Stage
from tests.support.ollama_server import OllamaServer
from tests.support.rawhttp import Address, call

_SAME = [
    "tiny",
    "tiny:latest",
    "TINY",
    "Tiny:Latest",
    "library/tiny",
    "registry.ollama.ai/library/tiny",
    "registry.ollama.ai/library/tiny:latest",
    "Registry.Ollama.AI/library/tiny",
    "https://registry.ollama.ai/library/tiny",
    "http://registry.ollama.ai/library/tiny:latest",
]
_OTHER = ["other/tiny", "hf.co/x/tiny", "ollama.com/library/tiny", "tiny-cloud", "tiny:1b"]
_INVALID = ["tiny:", "tiny@sha256:0", "./tiny", "a b/c::d", "a/b/c/d/e", "-tiny", "x" * 81]


@pytest.mark.parametrize("name", _SAME)
async def test_every_form_of_a_name_is_the_same_model_and_is_echoed(address: Address, name: str) -> None:
    reply = await call(address, "POST", "/api/generate", {"model": name})
    assert reply.status == 200
    assert reply.json()["model"] == name


async def test_equivalent_names_share_one_entry_in_ps(stage: Stage) -> None:
    stage.unload_all()
    for name in _SAME:
        stage.load(name)
    assert list(stage.loaded()) == ["tiny:latest"]


@pytest.mark.parametrize("name", _OTHER)
async def test_other_names_are_unknown(address: Address, name: str) -> None:
    reply = await call(address, "POST", "/api/generate", {"model": name})
    assert (reply.status, reply.json()) == (404, {"error": f"model '{name}' not found"})


@pytest.mark.parametrize("name", _INVALID)
async def test_invalid_names_are_refused(server: OllamaServer, name: str) -> None:
    reply = await call(server.address, "POST", "/api/chat", {"model": name})
    message = "model is required" if server.version == "0.11.4" else "invalid model name"
    assert (reply.status, reply.json()) == (400, {"error": message})


@pytest.mark.parametrize("name", [" tiny", "tiny "])
async def test_whitespace_around_a_name_is_trimmed(server: OllamaServer, name: str) -> None:
    reply = await call(server.address, "POST", "/api/generate", {"model": name})
    assert reply.status == (404 if server.version == "0.11.4" else 200)  # 0.11.4 treats them as part of the name
    assert server.version == "0.11.4" or reply.json()["model"] == name


async def test_the_local_suffix_names_the_local_model(server: OllamaServer) -> None:
    reply = await call(server.address, "POST", "/api/generate", {"model": "tiny:local"})
    assert reply.status == (404 if server.version == "0.11.4" else 200)  # 0.11.4 treats it as a tag


_BODIES: list[tuple[bytes, str | None]] = [
    (b'{"model":"nope","MODEL":"tiny"}', "tiny"),
    (b'{"model":"tiny","model":"nope"}', None),
    (b'{"Model":"tiny"}', "tiny"),
    (b'{"mODEL":"tiny"}', "tiny"),
    (b'{"\\u006dodel":"tiny"}', "tiny"),
    (b'{"model":"tiny","model":null}', "tiny"),
    (b'{"model":"tiny"}{"model":"nope"}', "tiny"),
    (b'{"model":"tiny"} and more', "tiny"),
    (b' \r\n\t{"model" : "tiny"}\n', "tiny"),
    (b'{"model":"tiny","prompt":null,"options":null,"keep_alive":null}', "tiny"),
    (b'{"model":"tiny","nonsense":{"deep":[1,2,{}]}}', "tiny"),
    (b'{"options":{"model":"nope"},"model":"tiny"}', "tiny"),
    (b'{"model":"t\\u0069ny"}', "tiny"),
]


@pytest.mark.parametrize(("body", "model"), _BODIES)
async def test_a_body_is_parsed_as_go_does(address: Address, body: bytes, model: str | None) -> None:
    reply = await call(address, "POST", "/api/generate", body)
    if model is None:
        assert (reply.status, reply.json()) == (404, {"error": "model 'nope' not found"})
    else:
        assert (reply.status, reply.json()["model"], reply.json()["done_reason"]) == (200, model, "load")


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/generate", {"model": "nope"}, 404, "model 'nope' not found"),
        ("/api/embed", {"model": "nope", "input": "x"}, 404, 'model "nope" not found, try pulling it first'),
        ("/api/embeddings", {"model": "nope", "prompt": "x"}, 404, 'model "nope" not found, try pulling it first'),
        ("/api/copy", {"source": "nope", "destination": "x"}, 404, 'model "nope" not found'),
        ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
        ("/api/chat", {"messages": []}, 400, "model is required"),
        ("/api/embeddings", {"prompt": "x"}, 400, "model is required"),
        ("/api/generate", b"", 400, "missing request body"),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/embed", b"", 400, "missing request body"),
        ("/api/show", b"", 400, "missing request body"),
        ("/api/chat", b"{bad", 400, "invalid character 'b' looking for beginning of object key string"),
        ("/api/chat", b'{"model":"tiny"', 400, "unexpected EOF"),
        ("/api/chat", b"[1]", 400, "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        ("/api/generate", {"model": "tiny", "keep_alive": "soon"}, 400, 'time: invalid duration "soon"'),
        (
            "/api/generate",
            {"model": "tiny", "prompt": "x", "options": {"num_ctx": "big"}},
            500,
            'option "num_ctx" must be of type integer',
        ),
        ("/api/generate", {"model": "embed", "prompt": "x"}, 400, '"embed" does not support generate'),
        ("/api/chat", {"model": "embed", "messages": []}, 400, '"embed" does not support chat'),
    ],
)
async def test_errors_of_the_native_api(address: Address, path: str, body: Any, status: int, message: str) -> None:
    reply = await call(address, "POST", path, body)
    assert (reply.status, reply.json()) == (status, {"error": message})
    assert reply.header("Content-Type") == "application/json; charset=utf-8"


async def test_show_names_an_unknown_model(server: OllamaServer) -> None:
    reply = await call(server.address, "POST", "/api/show", {"model": "nope"})
    name = "nope:latest" if server.is_0_30 else "nope"
    assert (reply.status, reply.json()) == (404, {"error": f"model '{name}' not found"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(("body", "message"), [(b"", "EOF"), (b'{"model":', "unexpected EOF")])
async def test_errors_of_the_openai_api_have_its_format(address: Address, path: str, body: bytes, message: str) -> None:
    reply = await call(address, "POST", path, body)
    assert reply.status == 400
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    assert reply.json() == {"error": error}


async def test_an_empty_list_of_openai_messages_is_refused(address: Address) -> None:
    reply = await call(address, "POST", "/v1/chat/completions", {"model": "tiny", "messages": []})
    assert (reply.status, reply.json()["error"]["message"]) == (400, "[] is too short - 'messages'")
