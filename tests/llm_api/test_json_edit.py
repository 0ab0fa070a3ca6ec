"""One member changes and every other byte stays: byte for byte, and as Go then reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.llm_api.json_edit import remove_nested, set_member, set_nested
from router.llm_api.json_members import Malformed, TooComplex
from tests.llm_api.bodies import BLANKS, BODIES, FITTING
from tests.llm_api.go_oracle import GoOracle

Edit = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"model":"a"}', b'{"model":"a","keep_alive":-1}'),
        (b'{"keep_alive":"5m","model":"a"}', b'{"keep_alive":-1,"model":"a"}'),
        (b'{ "model" : "a" , "keep_alive" : 5 , "x":1.50 }', b'{ "model" : "a" , "keep_alive" : -1 , "x":1.50 }'),
        (b'{"KEEP_ALIVE":5}', b'{"keep_alive":-1}'),
        (b'{"keep_alive":1,"a":2,"Keep_Alive":3}', b'{"a":2,"keep_alive":-1}'),
        (b'{"\\u006beep_alive":1}', b'{"keep_alive":-1}'),
        ('{"\u212aeep_alive":1,"b":2}'.encode(), b'{"keep_alive":-1,"b":2}'),
        (b"{}", b'{"keep_alive":-1}'),
        (b" { } trailing", b' {"keep_alive":-1 } trailing'),
        (b'{"a":{"keep_alive":5}}', b'{"a":{"keep_alive":5},"keep_alive":-1}'),
        (b'{"a":"\\"keep_alive\\":5"}x', b'{"a":"\\"keep_alive\\":5","keep_alive":-1}x'),
    ],
)
def test_a_member_is_set_where_it_stands_or_put_at_the_end(body: bytes, after: bytes) -> None:
    assert set_member(body, "keep_alive", b"-1") == after


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"a":1,"x":2,"b":3}', b'{"a":1,"b":3}'),
        (b'{"x":2,"b":3}', b'{"b":3}'),
        (b'{"a":1,"x":2}', b'{"a":1}'),
        (b'{ "x":2 }', b"{  }"),
        (b'{"x":1,"\\u0078":2,"a":3,"x":4}', b'{"a":3}'),
        (b'{"a":1}', b'{"a":1}'),
        (b'{"x":1,"x":2}', b"{}"),
    ],
)
def test_a_member_is_removed_however_often_it_is_written(body: bytes, after: bytes) -> None:
    assert remove_nested(b'{"in":%b}' % body, "in", "x") == b'{"in":%b}' % after


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"options":{"num_gpu":5,"a":1}}', b'{"options":{"a":1}}'),
        (b'{"options":{"NUM_GPU":5}}', b'{"options":{"NUM_GPU":5}}'),
        (b'{"Options":{"num_gpu":5}}', b'{"Options":{}}'),
        (b'{"options":null}', b'{"options":null}'),
        (b'{"a":1}', b'{"a":1}'),
        (b'{"options":{"num_gpu":1,"b":2},"OPTIONS":{"num_gpu":3,"c":4}}', b'{"options":{"b":2,"c":4}}'),
        (b'{"options":{"b":2},"options":null}', b'{"options":null}'),
        (b'{"options":{"b":2},"options":null,"options":{"c":1}}', b'{"options":{"c":1}}'),
    ],
)
def test_an_option_is_removed_by_its_exact_name_from_maps_that_are_one_to_go(body: bytes, after: bytes) -> None:
    assert remove_nested(body, "options", "num_gpu") == after


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"options":{"num_gpu":5,"a":1}}', b'{"options":{"num_gpu":99,"a":1}}'),
        (b'{"options":{}}', b'{"options":{"num_gpu":99}}'),
        (b'{"options":null}', b'{"options":{"num_gpu":99}}'),
        (b'{"a":1}', b'{"a":1,"options":{"num_gpu":99}}'),
        (b'{"options":{"a":1},"Options":{"b":2}}', b'{"options":{"a":1,"b":2,"num_gpu":99}}'),
    ],
)
def test_an_option_is_set_in_a_map_that_is_made_where_there_is_none(body: bytes, after: bytes) -> None:
    assert set_nested(body, "options", "num_gpu", b"99") == after


@pytest.mark.parametrize("body", [b"", b"[]", b'"a"', b"null", b"{", b'{"a"}', b'{"options":[]}', b'{"options":5}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        set_nested(body, "options", "a", b"1")
    if b"options" not in body:
        with pytest.raises(Malformed):
            set_member(body, "a", b"1")


# --- byte for byte ----------------------------------------------------------------------------------------------

VALUES = st.sampled_from(
    (b"1.50", b"1e2", b'"a\\u0062"', b"null", b"true", b'{"x": [1 , 2]}', b"[ ]", b'"\xff"', b"-0")
)
KEYS = st.sampled_from((b'"a"', b'"b"', b'"mode\\u006c"', b'"prompt"', '"é"'.encode(), b'""'))


@dataclass(frozen=True)
class Piece:
    before: bytes
    key: bytes
    colon: bytes
    value: bytes
    after: bytes

    @property
    def text(self) -> bytes:
        return self.before + self.key + self.colon + self.value + self.after


COLONS = st.sampled_from((b":", b" : ", b"\n:"))
PIECES = st.lists(st.builds(Piece, BLANKS, KEYS, COLONS, VALUES, BLANKS), max_size=5)
AFTER = st.sampled_from((b"", b"\n", b" tail", b"{}"))


@given(PIECES, st.builds(Piece, BLANKS, st.just(b'"target"'), COLONS, VALUES, BLANKS), st.data(), BLANKS, AFTER)
def test_to_set_a_member_changes_no_byte_beside_its_value(
    others: list[Piece], target: Piece, data: st.DataObject, blank: bytes, after: bytes
) -> None:
    at = data.draw(st.integers(0, len(others)))

    def body(value: bytes) -> bytes:
        pieces = [*others[:at], Piece(target.before, target.key, target.colon, value, target.after), *others[at:]]
        return blank + b"{" + b",".join(piece.text for piece in pieces) + b"}" + after

    assert set_member(body(target.value), "target", b'{"new":1}') == body(b'{"new":1}')
    assert set_member(body(target.value), "target", target.value) == body(target.value)


@given(PIECES, BLANKS, AFTER)
def test_to_put_a_member_in_and_to_take_it_out_again_changes_nothing(
    others: list[Piece], blank: bytes, after: bytes
) -> None:
    inner = b"{" + b",".join(piece.text for piece in others) + b"}"
    body = blank + b'{"outer":' + inner + b"}" + after
    longer = set_nested(body, "outer", "target", b"1")
    assert b'"target":1' in longer
    assert len(longer) == len(body) + len(b'"target":1') + bool(others)
    assert remove_nested(longer, "outer", "target") == body
    assert remove_nested(body, "outer", "target") == body


# --- as Go reads it ---------------------------------------------------------------------------------------------

ANY = st.one_of(FITTING, FITTING, BODIES)
CHECKED = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _edited(edit: Edit, body: bytes) -> bytes | None:
    try:
        return edit(body)
    except (Malformed, TooComplex):
        return None


def _seen(go: GoOracle, body: bytes) -> dict[str, Any] | None:
    found = go.decode("/api/generate", body)
    return found if found["ok"] else None


@CHECKED
@given(ANY)
def test_go_reads_the_member_that_was_set_and_everything_else_as_before(go: GoOracle, body: bytes) -> None:
    before = _seen(go, body)
    after = _edited(lambda text: set_member(text, "keep_alive", b"-1"), body)
    if before is None or not body.strip().startswith(b"{"):
        return
    assert after is not None
    assert _seen(go, after) == {**before, "keep_alive": -1}
    assert _edited(lambda text: set_member(text, "keep_alive", b"-1"), after) == after


@CHECKED
@given(ANY)
def test_go_reads_no_option_that_was_removed_and_all_others_as_before(go: GoOracle, body: bytes) -> None:
    before = _seen(go, body)
    if before is None or not body.strip().startswith(b"{"):
        return
    after = _edited(lambda text: remove_nested(text, "options", "num_gpu"), body)
    assert after is not None
    options = before["options"] and {name: v for name, v in before["options"].items() if name != "num_gpu"}
    seen = _seen(go, after)
    assert seen is not None
    assert (seen["options"] or None) == (options or None)
    assert {**seen, "options": None} == {**before, "options": None}


@CHECKED
@given(ANY, st.sampled_from(("num_gpu", "num_ctx", "new")))
def test_go_reads_an_option_that_was_set_and_all_others_as_before(go: GoOracle, body: bytes, name: str) -> None:
    before = _seen(go, body)
    if before is None or not body.strip().startswith(b"{"):
        return
    after = _edited(lambda text: set_nested(text, "options", name, b"99"), body)
    assert after is not None
    assert _seen(go, after) == {**before, "options": {**(before["options"] or {}), name: 99}}


def test_a_value_that_is_set_is_the_json_that_was_given() -> None:
    body = set_member(b'{"a":1}', "b", json.dumps({"c": [1, "é"]}).encode())
    assert json.loads(body) == {"a": 1, "b": {"c": [1, "é"]}}
