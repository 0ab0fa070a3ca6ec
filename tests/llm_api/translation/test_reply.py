"""Replies in OpenAI's API as Ollama's: streams however their bytes are split, and whole replies."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.llm_api.translation.events import EventReader
from router.llm_api.translation.reply import BadReply, ReplyTranslator, error_text
from router.llm_api.translation.request import ReplyShape
from tests.support.openai_server import HELLO, delta, event, finish, usage

DONE = b"data: [DONE]\n\n"


class _Clock:
    """Half a second passes with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def _translator(shape: ReplyShape = ReplyShape.CHAT) -> ReplyTranslator:
    return ReplyTranslator(shape, "m:1b", lambda: "2026-01-01T00:00:00Z", _Clock())


def _lines(*pieces: bytes, shape: ReplyShape = ReplyShape.CHAT) -> list[Any]:
    translator = _translator(shape)
    lines = [line for piece in pieces for line in translator.feed(piece)] + translator.end()
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    return [json.loads(line) for line in lines]


def _stream(*events: Any) -> bytes:
    return b"".join(map(event, events))


def test_a_stream_ends_after_the_counts_that_come_after_its_reason() -> None:
    *pieces, last = _lines(_stream(*HELLO), DONE)
    assert "".join(piece["message"]["content"] for piece in pieces) == "Hello"
    assert last == {
        "model": "m:1b", "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": ""},
        "done": True, "done_reason": "stop", "total_duration": 1_000_000_000, "load_duration": 0,
        "prompt_eval_count": 7, "prompt_eval_duration": 500_000_000, "eval_count": 2, "eval_duration": 500_000_000,
    }  # fmt: skip


def test_the_servers_own_timings_come_first() -> None:
    last = _lines(_stream(delta(content="a"), {"choices": [], "timings": {"prompt_ms": 3, "predicted_ms": 7.5}}), DONE)[
        -1
    ]
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (3_000_000, 7_500_000)
    assert "eval_count" not in last


@given(st.lists(st.integers(1, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_it_does_not_matter_where_a_stream_is_split(cuts: list[int], end: bytes) -> None:
    whole = (b": comment\n\nevent: x\n" + _stream(*HELLO) + DONE).replace(b"\n", end)
    at = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    pieces = [whole[start:stop] for start, stop in pairwise(at)]
    found = _lines(*pieces)
    assert [line["message"]["content"] for line in found] == ["Hel", "lo", ""]
    assert found[-1]["done"] is True


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_any_bytes_are_split_into_the_same_events_at_any_point(text: bytes, cuts: list[int]) -> None:
    def events(pieces: list[bytes]) -> list[bytes]:
        reader = EventReader()
        return [data for piece in pieces for data in reader.feed(piece)] + reader.rest()

    at = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert events([text[a:b] for a, b in pairwise(at)]) == events([text])


@given(st.binary(max_size=300))
def test_any_bytes_are_translated_or_refused_and_never_end_well_without_the_mark(text: bytes) -> None:
    translator = _translator()
    try:
        lines = translator.feed(text) + translator.end()
    except BadReply:
        return
    if b"[DONE]" not in text:
        assert all(not json.loads(line).get("done") for line in lines)


def test_an_error_before_the_end_mark_is_an_error_and_nothing_comes_after_it() -> None:
    dead = {"error": {"message": "EngineCore died", "code": 500}}
    found = _lines(_stream(delta(content="a"), dead, delta(content="b")), DONE)
    assert found[-1] == {"error": "EngineCore died"}
    assert len(found) == 2


def test_a_stream_that_just_stops_has_no_last_line() -> None:
    found = _lines(_stream(*HELLO))
    assert [line["done"] for line in found] == [False, False]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_comes_back_under_either_name(name: str) -> None:
    first, second, _ = _lines(_stream(delta(**{name: "hm"}), delta(content="a")), DONE)
    assert (first["message"]["thinking"], first["message"]["content"]) == ("hm", "")
    assert "thinking" not in second["message"]
    (first, _) = _lines(_stream(delta(**{name: "hm"})), DONE, shape=ReplyShape.GENERATE)
    assert (first["thinking"], first["response"]) == ("hm", "")


def test_calls_are_held_until_their_arguments_are_whole() -> None:
    pieces = [
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]),
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ":[1]}"}}]),
        finish("tool_calls"),
    ]
    called, last = _lines(_stream(*pieces, usage(1, 2)), DONE)
    assert called["message"]["tool_calls"] == [
        {"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": [1]}}},
        {"id": "b", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert (called["done"], last["done"], last["done_reason"]) == (False, True, "stop")


def test_arguments_that_are_no_object_are_an_error() -> None:
    piece = delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x'}}])
    (only,) = _lines(_stream(piece, finish("tool_calls")), DONE)
    assert "'f' with arguments that are no JSON object" in only["error"]


@pytest.mark.parametrize(("reason", "expected"), [("stop", "stop"), ("length", "length"), ("tool_calls", "stop")])
def test_reasons(reason: str, expected: str) -> None:
    assert _lines(_stream(finish(reason)), DONE)[-1]["done_reason"] == expected


def test_a_whole_chat_with_everything() -> None:
    function = {"name": "f", "arguments": '{"x":1}'}
    message = {"content": None, "reasoning": "hm", "tool_calls": [{"id": "a", "function": function}]}
    body = {
        "choices": [{"message": message, "finish_reason": "tool_calls"}],
        **usage(3, 4),
        "object": "chat.completion",
    }
    body["choices"] = [{"message": message, "finish_reason": "tool_calls"}]
    found = json.loads(_translator().whole(json.dumps(body).encode()))
    assert found["message"] == {
        "role": "assistant", "content": "", "thinking": "hm",
        "tool_calls": [{"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}}],
    }  # fmt: skip
    assert (found["done"], found["done_reason"], found["prompt_eval_count"], found["eval_count"]) == (
        True,
        "stop",
        3,
        4,
    )


@pytest.mark.parametrize("body", [b"", b"[]", b'{"choices":[]}', b'{"error":{"message":"no"}}', b"<html>"])
def test_a_whole_reply_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(BadReply):
        _translator().whole(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error":{"message":"no"}}', "no"),
        (b'{"error":"no"}', "no"),
        (b'{"object":"error","message":"no","code":400}', "no"),
        (b'{"detail":"no"}', "no"),
        (b'{"detail":[{"loc":["body"]}]}', '[{"loc":["body"]}]'),
        (b"no\n", "no"),
        (b"", "the model's server reported an error without a message"),
    ],
)
def test_messages_of_errors(body: bytes, expected: str) -> None:
    assert error_text(body) == expected
