"""Errors in the form of the API that was called, against what a real 0.24.0 answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import BadRequest, ModelNotFound, QueueFull, RouterError, WaitTimeout
from router.http1.response_writer import LocalResponse
from router.llm_api.errors import Api, api_of, error_reply, stream_error
from tests.contract.recording import recordings

RECORDED = {recording.name.removeprefix("0.24.0/"): recording for recording in recordings()}
BUSY = "server busy, please try again.  maximum pending requests exceeded"


def _recorded(name: str) -> tuple[int, str | None, bytes]:
    reply = RECORDED[name].reply
    return reply.head.status, reply.head.header("Content-Type"), b"".join(reply.chunks)


def _content_type(reply: LocalResponse) -> str:
    return dict(reply.headers)["Content-Type"]


def _without_ours(body: bytes, api: Api) -> Any:
    """With what the router says more than a server, and what is drawn by lot, made equal."""
    content = json.loads(body)
    if api is Api.OPENAI:
        content["error"]["code"] = None
    if api is Api.ANTHROPIC:
        assert content["request_id"].startswith("req_")
        content["request_id"] = "req_"
    return content


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("overload-api-chat", QueueFull(BUSY)),
        ("overload-api-embed", QueueFull(BUSY)),
        ("error-chat-unknown-model", ModelNotFound("model 'nope' not found")),
        ("error-chat-bad-json", BadRequest("invalid character 'b' looking for beginning of object key string")),
        ("overload-v1-chat-completions", QueueFull(BUSY)),
        ("overload-v1-embeddings", QueueFull(BUSY)),
        ("overload-v1-responses-stream", QueueFull(BUSY)),
        ("error-v1-chat-completions-unknown-model", ModelNotFound("model 'nope' not found")),
        ("error-v1-chat-completions-empty-body", BadRequest("EOF")),
        ("overload-v1-messages-stream", QueueFull(BUSY)),
        ("error-v1-messages-unknown-model", ModelNotFound("model 'nope' not found")),
        ("error-v1-messages-empty-body", BadRequest("EOF")),
    ],
)
def test_each_api_is_told_as_a_server_tells_it(name: str, error: RouterError) -> None:
    status, content_type, body = _recorded(name)
    path = RECORDED[name].request.split()[1].decode()
    api = api_of(path)
    reply = error_reply(api, error)
    assert (reply.status, _content_type(reply)) == (status, content_type)
    assert _without_ours(reply.body, api) == _without_ours(body, api)
    assert reply.body.endswith(b"\n") == body.endswith(b"\n")
    if api is Api.OLLAMA:
        assert reply.body == body


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/api/chat", Api.OLLAMA),
        ("/", Api.OLLAMA),
        ("/v1", Api.OLLAMA),
        ("/metrics", Api.OLLAMA),
        ("/v1/models", Api.OPENAI),
        ("/v1/messagesx", Api.OPENAI),
        ("/v1/messages", Api.ANTHROPIC),
        ("/v1/messages/count_tokens", Api.ANTHROPIC),
    ],
)
def test_a_path_belongs_to_its_api(path: str, api: Api) -> None:
    assert api_of(path) is api


def test_the_stable_code_and_when_to_come_again_are_told_to_all() -> None:
    for api in Api:
        headers = dict(error_reply(api, QueueFull("full", retry_after_seconds=7)).headers)
        assert (headers["X-Llamayard-Error"], headers["Retry-After"]) == ("queue_full", "7")
        assert "Retry-After" not in dict(error_reply(api, WaitTimeout("late")).headers)
    assert json.loads(error_reply(Api.OPENAI, QueueFull("full")).body)["error"]["code"] == "queue_full"


def test_a_request_id_is_told_where_the_shape_has_a_place_for_it() -> None:
    for given_id, told in (("abc", "req_abc"), ("req_abc", "req_abc")):
        assert json.loads(error_reply(Api.ANTHROPIC, BadRequest("x"), given_id).body)["request_id"] == told
    assert b"abc" not in error_reply(Api.OPENAI, BadRequest("x"), "abc").body


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (404, "not_found_error", "not_found_error"),
        (422, "api_error", "api_error"),
        (502, "api_error", "api_error"),
        (503, "api_error", "overloaded_error"),
        (504, "api_error", "api_error"),
        (403, "api_error", "permission_error"),
    ],
)
def test_each_status_has_its_type(status: int, openai: str, anthropic: str) -> None:
    error = RouterError("x", status=status)
    assert json.loads(error_reply(Api.OPENAI, error).body)["error"]["type"] == openai
    assert json.loads(error_reply(Api.ANTHROPIC, error).body)["error"]["type"] == anthropic
    assert error_reply(Api.OPENAI, error).status == status


# --- after bytes are out ----------------------------------------------------------------------------------------

GONE = RouterError("gone")


def test_a_stream_of_lines_ends_in_an_error_line() -> None:
    for kind in ("application/x-ndjson", "application/x-ndjson; charset=utf-8", "Application/X-NDJSON"):
        assert stream_error(Api.OLLAMA, kind, GONE, sent=b'{"a":1}\n') == b'{"error":"gone"}\n'
        assert stream_error(Api.OLLAMA, kind, GONE, sent=b'{"a":') == b'\n{"error":"gone"}\n'


def test_a_stream_of_events_ends_in_an_error_event_of_its_api() -> None:
    openai = stream_error(Api.OPENAI, "text/event-stream", GONE, sent=b"data: {}\n\n")
    assert openai.startswith(b"data: ")
    assert openai.endswith(b"\n\n")
    assert b"[DONE]" not in openai
    assert json.loads(openai[6:])["error"]["message"] == "gone"
    anthropic = stream_error(Api.ANTHROPIC, "text/event-stream", GONE, sent=b"data: {")
    assert anthropic.startswith(b"\n\nevent: error\ndata: ")
    assert json.loads(anthropic.split(b"data: ")[1])["error"]["message"] == "gone"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "", "text/plain"])
def test_to_what_is_no_stream_nothing_can_be_added(kind: str) -> None:
    assert stream_error(Api.OPENAI, kind, GONE) == b""


def test_words_are_escaped_as_go_escapes_them() -> None:
    reply = error_reply(Api.OLLAMA, BadRequest("<a> & \u2028 é \ud800"))
    assert reply.body == '{"error":"\\u003ca\\u003e \\u0026 \\u2028 é ?"}'.encode()


@given(st.text(), st.sampled_from(Api), st.integers(400, 599))
def test_whatever_the_words_the_answer_is_one_line_of_json(words: str, api: Api, status: int) -> None:
    error = RouterError(words, status=status)
    body = error_reply(api, error).body
    assert body.count(b"\n") == (1 if body.endswith(b"\n") else 0)
    told = words.encode(errors="replace").decode()
    found = json.loads(body)["error"]
    assert (found if api is Api.OLLAMA else found["message"]) == told
    assert stream_error(api, "application/x-ndjson", error).count(b"\n") == 1
