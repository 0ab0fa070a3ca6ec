"""The short way to a body's members gives what the long way gives, or leaves it to that."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import BadRequest
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.body_schema import SCHEMAS
from router.llm_api.fast_body_reader import parse_body_fast
from tests.llm_api.bodies import BODIES

_PATHS = st.sampled_from((*SCHEMAS, "/api/unknown"))


@given(BODIES, _PATHS)
@settings(max_examples=1500)
def test_what_is_seen_at_a_glance_is_what_is_there(body: bytes, path: str) -> None:
    seen = parse_body_fast(body, path)
    if seen is not None:
        assert seen == parse_body(body, path)


_MESSAGES = [{"role": "user", "content": 'say "hi" \\ twice'}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": "llama3.2", "messages": _MESSAGES}),
        ("/api/chat", {"model": "llama3.2", "messages": _MESSAGES, "stream": False, "keep_alive": "5m"}),
        ("/api/chat", {"model": "a", "messages": [], "keep_alive": 0}),
        ("/api/generate", {"model": "a", "prompt": "x", "options": {"num_ctx": 4096, "temperature": 0.7, "seed": 1}}),
        ("/api/generate", {"model": "a", "prompt": "x", "options": {"num_predict": 5, "use_mmap": True}}),
        ("/api/generate", {"model": "a", "keep_alive": -1}),
        ("/api/embed", {"model": "a", "input": ["x", "y"]}),
        ("/api/embeddings", {"model": "a", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "a", "messages": _MESSAGES, "max_tokens": 9, "stream": True}),
        ("/v1/completions", {"model": "a", "prompt": "x"}),
        ("/v1/embeddings", {"model": "a", "input": []}),
        ("/v1/responses", {"model": "a", "input": "x", "max_output_tokens": 3}),
        ("/v1/messages", {"model": "a", "messages": _MESSAGES, "max_tokens": 3}),
    ],
)
def test_ordinary_bodies_need_no_more_than_a_glance(path: str, body: dict[str, object]) -> None:
    for written in (json.dumps(body), json.dumps(body, separators=(",", ":")), json.dumps(body, indent=1)):
        assert parse_body_fast(written.encode(), path) == parse_body(written.encode(), path)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"Model":"a"}',
        b'{"model":"a","MODEL":"b"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"model":"a","options":{"num_ctx":1},"options":{}}',
        b'{"model":"a","\xc5\xbftream":false}',
        b'{"model":"a","\xe2\x84\xaaeep_alive":0}',
        b'{"model":null}',
        b'{"model":""}',
        b'{"model":"a"}{"model":"b"}',
        b"{}",
        b"[]",
        b"",
        b"{",
    ],
)
def test_what_other_readers_could_see_otherwise_is_left_to_the_long_way(body: bytes) -> None:
    assert parse_body_fast(body, "/api/chat") is None


def test_bodies_too_complex_for_the_long_way_are_not_judged_by_the_short_one() -> None:
    body = b'{"model":"a",' + b",".join(b'"k%d":0' % number for number in range(20_000)) + b"}"
    assert parse_body_fast(body, "/api/chat") is None
    with pytest.raises(BadRequest):
        parse_body(body, "/api/chat")
    assert isinstance(parse_body_fast(b'{"model":"a"}', "/api/chat"), ParsedBody)
