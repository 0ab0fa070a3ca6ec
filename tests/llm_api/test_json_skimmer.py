"""A body without its long strings says the same of everything that routing reads."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.json_members import scan
from router.llm_api.json_skimmer import LONG_STRING_BYTES, QUOTES_MAX, JsonSkimmer

_ODD = ('say "hi"', "back\\slash", 'both \\" of "\\\\', "\\" * 7, "", "ä\u2028")
_TEXTS = st.text(max_size=20) | st.sampled_from(_ODD)
_UNITS = st.sampled_from(("x", '\\"' + "y" * 50, "ab\\"))
_STRINGS = _TEXTS | st.builds(lambda unit, tail: unit * (LONG_STRING_BYTES // len(unit) + 2) + tail, _UNITS, _TEXTS)
_MESSAGE = {"role": st.just("user"), "content": _STRINGS, "images": st.lists(_STRINGS, max_size=2)}
_MESSAGES = st.lists(st.fixed_dictionaries(_MESSAGE), max_size=2)
_BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(("tiny", "a b", "x\\y")),
        "messages": _MESSAGES,
        "prompt": _STRINGS,
        "stream": st.booleans(),
        "keep_alive": st.sampled_from((0, "5m", -1)),
        "options": st.fixed_dictionaries({}, optional={"num_ctx": st.integers(1, 9), "stop": _STRINGS}),
        "other": _STRINGS,
    },
)


def _pieces(data: st.DataObject, raw: bytes) -> list[bytes]:
    places = st.integers(1, len(raw) - 1) | st.sampled_from([i for i, b in enumerate(raw) if b in b'"\\'] or [1])
    cuts = sorted(data.draw(st.sets(places.filter(lambda at: 0 < at < len(raw)), max_size=8)))
    return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


_PATHS = st.sampled_from(("/api/chat", "/api/generate", "/v1/chat/completions"))


@given(_BODIES, st.booleans(), _PATHS, st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_left_is_read_as_the_whole_is(
    body: dict[str, object], ascii_only: bool, path: str, data: st.DataObject
) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only).encode()
    reduced = JsonSkimmer()
    for piece in _pieces(data, raw):
        reduced.feed(piece)
    text = reduced.text()
    assert text is not None
    assert len(text) <= len(raw)
    assert structs.replace(parse_body(text, path), prompt_bytes=0) == structs.replace(
        parse_body(raw, path), prompt_bytes=0
    )


def test_long_strings_are_taken_out_and_text_is_counted() -> None:
    image, words = "i" * 100_000, "w" * 50_000
    body = {"model": "tiny", "messages": [{"role": "user", "content": words, "images": [image]}], "stream": True}
    reduced = JsonSkimmer()
    reduced.feed(json.dumps(body).encode())
    expected = {**body, "messages": [{"role": "user", "content": "~", "images": ["~"]}]}
    assert reduced.text() == json.dumps(expected).encode()
    beginning = reduced.beginning("/api/chat")
    assert beginning is not None
    assert (reduced.text_bytes, beginning.parsed) == (50_000, ParsedBody(model="tiny"))


_OPTIONS = b'"options":{"num_ctx":8,"stop":"x"}'


@pytest.mark.parametrize(
    ("raw", "model", "keep_alive", "options"),
    [
        (b'{"model":"a","messages":[', "a", None, {}),
        (b' {\n "model" : "a" , ', "a", None, {}),
        (b'{"model":"a"', None, None, {}),
        (b'{"stream":true,"model":"a",', "a", None, {}),
        (b'{"model":"a\\u0062",', None, None, {}),
        (b'{"Model":"a",', None, None, {}),
        (b'{"model":null,', None, None, {}),
        (b'{"model":"a","model":"b",', None, None, {}),
        (b'{"model":"a",' + _OPTIONS + b',"keep_alive":"5m","messages":[', "a", "5m", {"num_ctx": 8}),
        (b'{"model":"a","keep_alive":"5m", "options":{"stop":["{"],"num_ctx":8},', "a", "5m", {}),
        (b'{"model":"a","system":"' + b"s" * 20_000 + b'","keep_alive" : 30 ,"messages":[', "a", 30, {}),
        (b'{"messages":[{"model":"a","keep_alive":1}],"model":"b",', None, None, {}),
        (b"", None, None, {}),
        (b"[", None, None, {}),
    ],
)
def test_the_first_members_are_read_before_the_body_has_come(
    raw: bytes, model: str | None, keep_alive: object, options: dict[str, object]
) -> None:
    reduced = JsonSkimmer()
    reduced.feed(raw)
    beginning = reduced.beginning("/api/chat")
    if model is None:
        assert beginning is None
        return
    assert beginning is not None
    assert (beginning.parsed.model, beginning.parsed.keep_alive) == (model, keep_alive)
    assert (beginning.parsed.options, beginning.parsed.is_load_only) == (options, False)
    if keep_alive is not None:
        assert beginning.keep_alive is not None
        assert json.loads(raw[slice(*beginning.keep_alive)]) == keep_alive


@given(_BODIES, st.data())
@settings(max_examples=300, deadline=None)
def test_a_member_is_where_its_place_in_the_text_says(body: dict[str, object], data: st.DataObject) -> None:
    raw = json.dumps(body).encode()
    reduced = JsonSkimmer()
    for piece in _pieces(data, raw):
        reduced.feed(piece)
    text = reduced.text()
    assert text is not None
    for member in scan(text).members:
        value = raw[reduced.place(member.value_start) : reduced.place(member.value_end)]
        assert json.loads(value) == body[member.key]


@given(_BODIES, st.sampled_from((b"", b" " * 9, b"}", b'{"model":"z"', b"\n\n")), st.data())
@settings(max_examples=300, deadline=None)
def test_no_end_of_an_object_is_missed(body: dict[str, object], after: bytes, data: st.DataObject) -> None:
    raw = json.dumps(body).encode()
    reduced, fed = JsonSkimmer(), 0
    for piece in _pieces(data, raw + after):
        reduced.feed(piece)
        fed += len(piece)
        assert reduced.may_have_ended == (fed >= len(raw))


def test_bodies_with_too_many_quotes_are_given_up() -> None:
    reduced = JsonSkimmer()
    reduced.feed(b'{"a":[' + b'"x",' * QUOTES_MAX)
    assert (reduced.text(), reduced.beginning("/api/chat")) == (None, None)
    assert reduced.may_have_ended
