"""Requests in Ollama's API as OpenAI's: each difference between the two."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.engines.base import EngineTarget
from router.errors import BadRequest
from router.llm_api.translation.request import translated

PLAIN = EngineTarget("Org/Own")
VLLM = EngineTarget("Org/Own", repeat_penalty="repetition_penalty")
LLAMA = EngineTarget("Org/Own", repeat_penalty="repeat_penalty")


def _sent(path: str, body: Any, target: EngineTarget = VLLM) -> Any:
    return json.loads(translated(path, json.dumps(body).encode()).body(target))


def _chat(**members: Any) -> Any:
    return _sent("/api/chat", {"model": "m", "messages": [{"role": "user", "content": "hi"}], **members})


def test_a_request_streams_unless_it_says_otherwise() -> None:
    assert (_chat()["stream"], _chat()["stream_options"]) == (True, {"include_usage": True})
    whole = _chat(stream=False)
    assert (whole["stream"], "stream_options" in whole) == (False, False)


def test_ollamas_defaults_are_sent_where_others_differ() -> None:
    assert (_chat()["temperature"], _chat()["top_p"]) == (0.8, 0.9)
    assert _chat(options={"temperature": 0})["temperature"] == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"num_predict": 5}, {"max_tokens": 5}),
        ({"num_predict": -1}, {}),
        ({"seed": 3}, {"seed": 3}),
        ({"seed": -1}, {}),
        ({"stop": ["a"]}, {"stop": ["a"]}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"top_k": 3, "min_p": 0.1}, {"top_k": 3, "min_p": 0.1}),
        ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"num_ctx": 9, "mirostat": 1}, {}),
        ({"top_k": None}, {}),
    ],
)
def test_options_have_their_equals(option: Any, expected: Any) -> None:
    added = {name: value for name, value in _chat(options=option).items() if name not in _chat()}
    assert added == expected


def test_a_server_without_extensions_gets_none_and_the_client_is_told() -> None:
    asked = {"messages": [], "options": {"top_k": 3, "repeat_penalty": 1.1, "num_ctx": 9}}
    request = translated("/api/chat", json.dumps(asked).encode())
    assert request.dropped_for(PLAIN) == ("num_ctx", "repeat_penalty", "top_k")
    assert request.dropped_for(LLAMA) == ("num_ctx",)
    assert not {"top_k", "repeat_penalty"} & json.loads(request.body(PLAIN)).keys()
    assert json.loads(request.body(LLAMA))["repeat_penalty"] == 1.1


@pytest.mark.parametrize(
    ("given_format", "expected"),
    [
        ("json", {"type": "json_object"}),
        (
            {"type": "object"},
            {"type": "json_schema", "json_schema": {"name": "response", "schema": {"type": "object"}}},
        ),
        ("", None),
        (None, None),
    ],
)
def test_formats(given_format: Any, expected: Any) -> None:
    assert _chat(format=given_format).get("response_format") == expected


def test_thinking() -> None:
    assert _chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert _chat(think="low")["reasoning_effort"] == "low"
    assert not {"chat_template_kwargs", "reasoning_effort"} & _chat().keys()


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\0\0\0\0WEBP", "image/webp"),
        (b"BM\0\0", "image/bmp"),
    ],
)
def test_an_images_type_is_told_by_its_content(beginning: bytes, kind: str) -> None:
    image = base64.b64encode(beginning + bytes(100)).decode()
    sent = _sent("/api/generate", {"prompt": "what", "images": [image]})
    assert sent["messages"][0]["content"] == [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{image}"}},
    ]


def test_calls_get_ids_and_results_are_paired_by_name_then_order() -> None:
    calls = [{"function": {"name": name, "arguments": {"n": n}}} for n, name in enumerate(("a", "b", "a"))]
    results = [{"role": "tool", "content": "", **name} for name in ({"tool_name": "b"}, {}, {"name": "a"}, {})]
    messages = _sent("/api/chat", {"messages": [{"role": "assistant", "tool_calls": calls}, *results]})["messages"]
    sent = messages[0]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in sent] == [{"n": 0}, {"n": 1}, {"n": 2}]
    a1, b, a2 = (call["id"] for call in sent)
    assert len({a1, b, a2}) == 3
    paired = [message["tool_call_id"] for message in messages[1:]]
    assert paired[:3] == [b, a1, a2]
    assert paired[3] not in (a1, b, a2)


def test_a_raw_prompt_stays_raw_and_others_become_a_chat() -> None:
    raw = translated("/api/generate", b'{"prompt":"<s>a","raw":true}')
    assert (raw.path, json.loads(raw.body(PLAIN))["prompt"]) == ("/v1/completions", "<s>a")
    chat = _sent("/api/generate", {"prompt": "a", "system": "b"})
    assert chat["messages"] == [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]


def test_embeddings() -> None:
    sent = translated("/api/embed", b'{"input":["a"],"dimensions":4,"truncate":true,"options":{"num_ctx":9}}')
    assert json.loads(sent.body(VLLM)) == {
        "model": "Org/Own", "input": ["a"], "encoding_format": "float", "dimensions": 4,
    }  # fmt: skip
    assert sent.dropped_for(VLLM) == ("num_ctx", "truncate")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/chat", b"[]", "the body"),
        ("/api/chat", b'{"messages":{}}', "messages"),
        ("/api/chat", b'{"messages":[1]}', "messages[0]"),
        ("/api/chat", b'{"messages":[{"role":1}]}', "messages[0].role"),
        ("/api/chat", b'{"messages":[{"role":"user","images":["%%%%"]}]}', "messages[0].images[0]"),
        ("/api/chat", b'{"messages":[{"role":"user","images":["AAAA"]}]}', "messages[0].images[0]"),
        ("/api/chat", b'{"messages":[],"options":{"top_k":"x"}}', "options.top_k"),
        ("/api/chat", b'{"messages":[],"options":{"temperature":true}}', "options.temperature"),
        ("/api/chat", b'{"messages":[],"format":3}', "format"),
        ("/api/chat", b'{"messages":[],"think":3}', "think"),
        ("/api/generate", b'{"prompt":"a","suffix":"b"}', "suffix"),
        ("/api/generate", b'{"prompt":"a","template":"b"}', "template"),
        ("/api/generate", b'{"prompt":"a","context":[1]}', "context"),
        ("/api/embed", b'{"input":3}', "input"),
        ("/api/embeddings", b'{"prompt":3}', "prompt"),
    ],
)
def test_what_has_no_equal_or_a_wrong_type_is_refused_by_its_name(path: str, body: bytes, named: str) -> None:
    with pytest.raises(BadRequest) as refused:
        translated(path, body)
    assert refused.value.message.startswith(named)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_MEMBERS = (
    "messages", "prompt", "system", "images", "options", "format", "think", "tools", "stream", "raw", "input",
    "context", "suffix", "Messages", "dimensions",
)  # fmt: skip
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional=dict.fromkeys(("content", "images", "tool_calls", "tool_name", "tool_call_id"), _JSON),
)


@given(
    st.sampled_from(["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"]),
    st.dictionaries(st.sampled_from(_MEMBERS), _JSON | st.lists(_MESSAGE, max_size=3), max_size=6),
)
def test_any_body_is_translated_or_refused(path: str, body: Any) -> None:
    try:
        request = translated(path, json.dumps(body).encode())
    except BadRequest:
        return
    sent = json.loads(request.body(VLLM))
    assert sent["model"] == "Org/Own"
    assert request.path.startswith("/v1/")
