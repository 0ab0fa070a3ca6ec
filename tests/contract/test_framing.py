"""HTTP chunking and content types of responses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.stage import Stage
from tests.support.rawhttp import Address, call

_OPTIONS = {"num_predict": 6, "seed": 1}
_MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"model": "tiny", "prompt": "hello", "options": _OPTIONS}),
        ("/api/chat", {"model": "tiny", "messages": _MESSAGES, "options": _OPTIONS}),
    ],
)
async def test_each_line_of_a_stream_is_one_chunk(address: Address, path: str, body: dict[str, Any]) -> None:
    reply = await call(address, "POST", path, body)
    assert (reply.status, reply.end, reply.header("Content-Type")) == (200, "complete", "application/x-ndjson")
    assert len(reply.chunks) == 7  # six tokens and the final line
    assert all(chunk.endswith(b"\n") and chunk.count(b"\n") == 1 for chunk in reply.chunks)
    lines = reply.lines()
    assert [line["done"] for line in lines] == [False] * 6 + [True]
    assert lines[-1]["done_reason"] == "length"
    assert lines[-1]["eval_count"] == 6
    assert lines[-1]["prompt_eval_count"] > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": _MESSAGES}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
@pytest.mark.parametrize("usage", [True, False])
async def test_the_last_events_of_an_openai_stream_share_a_chunk(
    address: Address, path: str, body: dict[str, Any], usage: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    reply = await call(
        address, "POST", path, {"model": "tiny", "max_tokens": 4, "seed": 1, "stream": True, **body, **options}
    )
    assert (reply.status, reply.end, reply.header("Content-Type")) == (200, "complete", "text/event-stream")
    *token_chunks, last = reply.chunks
    assert len(token_chunks) == 4
    assert all(chunk.count(b"data: ") == 1 and chunk.endswith(b"\n\n") for chunk in token_chunks)
    assert last.endswith(b"data: [DONE]\n\n")
    ending = [json.loads(event[6:]) for event in last.decode().split("\n\n")[:-2]]
    assert ending[0]["choices"][0]["finish_reason"] == "length"
    assert [event["choices"] for event in ending[1:]] == [[]] * usage
    assert all(event["usage"]["completion_tokens"] == 4 for event in ending[1:])


async def test_an_unstreamed_response_under_two_kilobytes_has_a_content_length(address: Address) -> None:
    body = {"model": "tiny", "prompt": "hello", "stream": False, "options": _OPTIONS}
    reply = await call(address, "POST", "/api/generate", body)
    assert reply.header("Content-Type") == "application/json; charset=utf-8"
    assert reply.header("Content-Length") == str(len(reply.body))
    assert reply.json()["done"] is True


async def test_a_long_unstreamed_response_is_chunked(address: Address) -> None:
    reply = await call(address, "POST", "/api/show", {"model": "tiny"})
    assert len(reply.body) > 2048
    assert reply.chunked


async def test_the_openai_api_sends_no_charset(address: Address) -> None:
    reply = await call(address, "POST", "/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 2})
    assert (reply.status, reply.header("Content-Type")) == (200, "application/json")


async def test_responses_have_no_server_header_and_no_compression(address: Address) -> None:
    reply = await call(address, "GET", "/api/tags", headers=(("Accept-Encoding", "gzip"),))
    assert reply.header("Server") is None
    assert reply.header("Content-Encoding") is None
    assert reply.header("Date") is not None
    assert reply.json()["models"]


async def test_there_is_one_embedding_per_input(stage: Stage) -> None:
    reply = await call(stage.server.address, "POST", "/api/embed", {"model": "embed", "input": ["a", "b c", "d"]})
    vectors = reply.json()["embeddings"]
    assert [len(vector) for vector in vectors] == [64] * 3
    assert vectors[0] != vectors[1]
