"""The short way to a body's members gives what the long way gives, or leaves it to that."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from router.errors import BadRequest
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.body_schema import SCHEMAS
from router.llm_api.fast_body_reader import outline_of, parse_body_fast
from router.llm_api.json_members import blanks_of, decode_members, scan
from tests.llm_api.bodies import BODIES, FITTING

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


_WRITTEN = st.one_of(
    BODIES, FITTING, FITTING.map(lambda body: _rewritten(body, 0)), FITTING.map(lambda b: _rewritten(b, 1))
)


def _rewritten(body: bytes, blanks: int) -> bytes:
    """Its members without blanks, or with one after each colon and comma; repeated ones too."""
    try:
        members = scan(body).members
    except ValueError:
        return body
    gap = b" " * blanks
    keys = [body[m.start : m.value_start].strip().rstrip(b":").rstrip() for m in members]
    values = [body[m.value_start : m.value_end] for m in members]
    texts = [key + b":" + gap + value for key, value in zip(keys, values, strict=True)]
    return b"{" + (b"," + gap).join(texts) + b"}"


@given(_WRITTEN)
@settings(max_examples=700)
def test_where_members_are_is_proven_by_their_lengths(body: bytes) -> None:
    members = decode_members(body)
    blanks = None if members is None else blanks_of(body, members)
    if members is None or blanks is None:
        return
    pairs: list[tuple[str, object]] = json.loads(body.decode("utf-8", "surrogateescape"), object_pairs_hook=list)
    assert [key for key, _ in pairs] == list(members)
    found = scan(body).members
    assert [member.key for member in found] == list(members)
    for member, raw in zip(found, members.values(), strict=True):
        assert body[member.value_start : member.value_end] == bytes(raw)
        assert body.startswith(b'"' + member.key.encode() + b'":', member.start)


@given(_WRITTEN, _PATHS)
@settings(max_examples=700)
def test_settings_that_are_alike_are_read_alike(body: bytes, path: str) -> None:
    seen = outline_of(body, path)
    if seen is None:
        return
    whole = parse_body(body, path)
    assert (whole.ambiguous, whole.is_load_only, whole.prompt_bytes * (not whole.unreadable)) == (
        (), False, seen.prompt_bytes * (not whole.unreadable),
    )  # fmt: skip
    if seen.keep_alive is not None:
        start, end = seen.keep_alive
        assert body[start:end] == bytes(msgspec.json.decode(body, type=dict[str, msgspec.Raw])["keep_alive"])
    pairs = zip(seen.settings[::2], seen.settings[1::2], strict=True)
    members = [b'"%b":%b' % (str(key).encode(), value) for key, value in pairs if isinstance(value, bytes)]
    prompt = SCHEMAS[path].prompt
    members += [b'"%b":"a text"' % prompt.encode()] if prompt else []
    again = parse_body(b"{" + b",".join(members) + b"}", path)
    assert structs.replace(again, prompt_bytes=0) == structs.replace(whole, prompt_bytes=0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","messages":[]}',
        b'{"model":"a","messages":[' + b" " * 40 + b"]}",
        b'{"model":"a","messages":null}',
        b'{"model":"a"}',
        b'{"model":"a","messages":[{}],"model":"b"}',
        b'{"model":"a","messages":[{}],"Model":"b"}',
        b'{"model":"a","messages":[{}],"mod\\u0065l":"b"}',
        b' {"model":"a","messages":[{}]}',
        b'{"model": "a","messages": [{}]}',
        b'{"model":"a","messages":[{}]}{"model":"b"}',
        b'\xef\xbb\xbf{"model":"a","messages":[{}]}',
        b'{"model":"a","messages":[{}],"options":{"stop":"' + b"x" * 2000 + b'"}}',
    ],
)
def test_an_outline_guesses_nothing(body: bytes) -> None:
    assert outline_of(body, "/api/chat") is None


@pytest.mark.parametrize("nested", [b'"model":"b"', b'"keep_alive":0', b'"stream":true', b'"x":"\\"keep_alive\\":1"'])
def test_an_outline_has_only_members_of_the_body_itself(nested: bytes) -> None:
    deep = b"[" * 200 + b"{" + nested + b"}" + b"]" * 200
    body = b'{"model":"a","messages":[{"content":%b}],"keep_alive":"5m","tools":[{%b}],"n":NaN}' % (deep, nested)
    assert outline_of(body, "/api/chat") is None  # NaN
    seen = outline_of(body.replace(b"NaN", b"1e999"), "/api/chat")
    assert seen is not None
    assert seen.settings == ("model", b'"a"', "keep_alive", b'"5m"')
    assert seen.keep_alive is not None
    assert body[slice(*seen.keep_alive)] == b'"5m"'
