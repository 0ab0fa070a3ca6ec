"""Members are found where they stand, however they are written; what they say is left to others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.llm_api.json_members import DEPTH_MAX, Malformed, scan, text_of
from tests.llm_api.bodies import BLANKS, BODIES, STRINGS

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = st.lists(st.tuples(st.text(max_size=4), VALUES, st.booleans(), BLANKS, BLANKS), max_size=6)


@given(MEMBERS, BLANKS, st.sampled_from((b"", b" ", b"x", b"{}", b"\x00")))
def test_each_member_is_found_with_its_key_and_the_bytes_of_its_value(
    members: list[tuple[str, object, bool, bytes, bytes]], blank: bytes, after: bytes
) -> None:
    pieces = [
        (key, before + json.dumps(key, ensure_ascii=ascii_only).encode(errors="surrogatepass"),
         json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass"), behind)
        for key, value, ascii_only, before, behind in members
    ]  # fmt: skip
    body = blank + b"{" + blank + b",".join(k + b":" + v + end for _, k, v, end in pieces) + b"}" + after
    found = scan(body)
    assert body[: found.inside] == blank + b"{"
    assert [body[m.value_start : m.value_end] for m in found.members] == [value for _, _, value, _ in pieces]
    for member, (key, *_) in zip(found.members, pieces, strict=True):
        assert body[member.start : member.start + 1] == b'"'
        assert member.key == key.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(BODIES)
def test_any_bytes_are_scanned_or_refused(body: bytes) -> None:
    try:
        found = scan(body)
    except Malformed:
        return
    ends = [0]
    for member in found.members:
        assert ends[-1] <= member.start < member.value_start < member.value_end <= len(body)
        ends.append(member.value_end)


@given(
    st.lists(st.tuples(st.sampled_from((b'"a"', b'"A"', b'"\\u0061"', b'"b"')), STRINGS), max_size=4),
    st.binary(max_size=6),
)
def test_repeated_and_escaped_keys_are_all_found(pairs: list[tuple[bytes, bytes]], after: bytes) -> None:
    body = b"{" + b",".join(key + b":" + value for key, value in pairs) + b"}" + after
    try:
        found = scan(body)
    except Malformed:
        return
    assert [body[m.start : m.value_end] for m in found.members] == [k + b":" + v for k, v in pairs]


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        (b'"plain"', "plain"),
        (b'"\\u00e9\\n"', "é\n"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"\\ud800"', "\ufffd"),
        (b'"\\ud800\\ud83d\\ude00"', "\ufffd😀"),
        (b'"\xff\xfe"', "\ufffd\ufffd"),
        (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd"),
        ('"é"'.encode(), "é"),
    ],
)
def test_a_string_is_read_as_go_reads_it(literal: bytes, text: str) -> None:
    assert text_of(literal) == text


def test_nesting_is_followed_as_deep_as_go_follows_it_and_no_deeper() -> None:
    def body(depth: int) -> bytes:
        return b'{"a":0,"a":' + b"[" * depth + b"]" * depth + b"}"

    assert len(scan(body(DEPTH_MAX - 1)).members) == 2
    with pytest.raises(Malformed, match="nested deeper"):
        scan(body(DEPTH_MAX))
