"""The ends of bodies are found exactly, whatever pieces the bytes come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http1.body_framing import (
    LINE_BYTES_MAX,
    MORE,
    TRAILER_BYTES_MAX,
    Body,
    Chunked,
    FramingError,
    NoBody,
    Sized,
    UntilClose,
)

_AFTER = b"HTTP/1.1 200 OK\r\n"
_SIZES = st.sampled_from(("%x", "%X", "0%x", "%x;a=b", "%x ;q", '%x;n="v w"'))
_DATA = st.binary(min_size=1, max_size=40) | st.sampled_from((b"\r\n", b"0\r\n\r\n", b"5\r\n", b"tok tok\n"))
_MANY = b"".join(b"%x\r\n%b\r\n" % (size, b"t" * size) for size in range(1, 99))
"""More than what is read chunk by chunk."""
_TRAILERS = st.lists(st.sampled_from((b"X-A: 1\r\n", b"Empty:\r\n", b"Sum: \xe4\r\n")), max_size=3)


@st.composite
def _chunked(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A whole body with the data of its chunks."""
    chunks = draw(st.lists(_DATA, max_size=6))
    chunks += draw(st.sampled_from((0, 0, 1, 4, 30))) * chunks[-1:]  # a stream's tokens are often alike in size
    lines = [(draw(_SIZES) % len(chunk)).encode() + b"\r\n" + chunk + b"\r\n" for chunk in chunks]
    last = draw(st.sampled_from((b"0\r\n", b"000\r\n", b"0;x\r\n")))
    return b"".join((*lines, last, *draw(_TRAILERS), b"\r\n")), chunks


@st.composite
def _cut(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """The bytes in pieces, none of them empty."""
    cuts = sorted(draw(st.sets(st.integers(1, len(whole) - 1), max_size=12))) if len(whole) > 1 else []
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def _end_of(body: Body, pieces: list[bytes]) -> int:
    """The offset in all pieces after the message's last byte, or MORE."""
    before = 0
    for piece in pieces:
        end = body.feed(piece)
        if end != MORE:
            return before + end
        before += len(piece)
    return MORE


@given(st.data())
def test_a_chunked_body_ends_where_it_ends_for_every_split(data: st.DataObject) -> None:
    whole, chunks = data.draw(_chunked())
    payload: list[bytes] = []
    body = Chunked(payload)
    assert _end_of(body, data.draw(_cut(whole + _AFTER))) == len(whole)
    assert (b"".join(payload), body.chunks) == (b"".join(chunks), len(chunks))


@given(st.data(), st.integers(0, 3))
def test_many_chunks_in_one_piece_are_found_as_those_that_come_alone(data: st.DataObject, count: int) -> None:
    parts = [data.draw(_chunked()) for _ in range(3)]
    inner = [whole[: whole.rindex(b"\r\n0")] + b"\r\n" if chunks else b"" for whole, chunks in parts[:count]]
    whole = _MANY.join([b"", *inner, parts[-1][0]])
    whole = whole if data.draw(st.booleans()) else whole + _AFTER + _MANY
    pieces = data.draw(_cut(whole))
    one, other = Chunked(), Chunked([])
    assert _end_of(one, pieces) == _end_of(other, [bytes((byte,)) for byte in whole])
    assert one.chunks == other.chunks


@given(st.data())
def test_a_chunked_body_that_is_cut_short_goes_on(data: st.DataObject) -> None:
    whole, _ = data.draw(_chunked())
    kept = data.draw(st.integers(1, len(whole) - 1))
    body = Chunked()
    assert _end_of(body, data.draw(_cut(whole[:kept]))) == MORE
    assert not body.closed()


def test_every_split_in_two_and_each_byte_alone_give_the_same_end() -> None:
    whole = b"5\r\nhello\r\n5\r\nworld\r\n1;ext\r\n!\r\n0\r\nX-Sum: 1\r\n\r\n"
    for cut in range(1, len(whole)):
        assert _end_of(Chunked(), [whole[:cut], whole[cut:] + _AFTER]) == len(whole)
    assert _end_of(Chunked(), [bytes((byte,)) for byte in whole + _AFTER]) == len(whole)


@pytest.mark.parametrize(
    "bad",
    [
        b"x\r\n",
        b"5\nhello\n",
        b"5\r\nhello!\r\n",
        b"5\r\nhello\n\n",
        b"5\r\nhello\r\r",
        b"-1\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 5\r\nhello\r\n",
        b"\xff\r\n",
        b"\xffhello\r\n",
        b"\xff5\r\nhello\r\n0\r\n\r\n",
        b"\r\n5\r\nhello\r\n",
        b"1111111111111111\r\n",
        b";x\r\n",
        b"5;a\rb\r\nhello\r\n",
        b"5;\x00\r\nhello\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n: no name\r\n\r\n",
        b"0\r\nX:\x00\r\n\r\n",
        b"0\r\nX: a\r\n folded\r\n\r\n",
        b"0\r\nX : a\r\n\r\n",
    ],
)
def test_what_is_malformed_is_refused_whole_and_byte_by_byte(bad: bytes) -> None:
    with pytest.raises(FramingError):
        _end_of(Chunked(), [_MANY + bad])
    with pytest.raises(FramingError):
        _end_of(Chunked(), [bad])
    with pytest.raises(FramingError):
        _end_of(Chunked(), [bytes((byte,)) for byte in bad])


@given(st.data())
def test_a_malformed_body_is_refused_for_every_split_or_for_none(data: st.DataObject) -> None:
    raw = data.draw(
        st.lists(st.sampled_from((b"0", b"5", b"a", b"\r", b"\n", b";", b"X:", b"\r\n", b" ")), max_size=14)
    )
    whole = b"".join(raw) or b"0"

    def outcome(pieces: list[bytes]) -> int | str:
        try:
            return _end_of(Chunked(), pieces)
        except FramingError:
            return "refused"

    assert outcome(data.draw(_cut(whole))) == outcome([whole])


def test_lines_that_do_not_end_are_refused() -> None:
    with pytest.raises(FramingError):
        _end_of(Chunked(), [b"5;" + b"x" * LINE_BYTES_MAX])
    with pytest.raises(FramingError):
        _end_of(Chunked(), [b"5;" + b"x" * LINE_BYTES_MAX + b"\r\nhello\r\n0\r\n\r\n"])
    with pytest.raises(FramingError):
        _end_of(Chunked(), [b"0\r\n" + b"X: y\r\n" * (TRAILER_BYTES_MAX // 6 + 1)])


@given(st.binary(max_size=30), st.binary(min_size=1, max_size=30), st.data())
def test_a_sized_body_ends_after_its_length(content: bytes, after: bytes, data: st.DataObject) -> None:
    assert _end_of(Sized(len(content)), data.draw(_cut(content + after))) == len(content)


def test_bodies_know_whether_a_close_ends_them_well() -> None:
    short = Sized(3)
    assert (short.feed(b"ab"), short.closed()) == (MORE, False)
    assert (short.feed(b"c"), short.closed()) == (1, True)
    assert (NoBody().feed(b"next"), NoBody().closed()) == (0, True)
    assert (UntilClose().feed(b"any"), UntilClose().closed()) == (MORE, True)
    assert not Chunked().closed()


def test_the_place_between_two_chunks_is_known() -> None:
    body = Chunked()
    places: list[bool] = []
    for piece in (b"3\r", b"\nab", b"c\r", b"\n", b"0\r\n"):
        body.feed(piece)
        places.append(body.at_boundary)
    assert places == [False, False, False, True, False]


def test_looking_from_a_later_start_gives_indexes_into_the_whole_piece() -> None:
    body = Chunked()
    assert body.feed(b"head3\r", 4) == MORE
    assert body.feed(b"junk\nabc\r\n0\r\n\r\nX", 4) == 15
    assert Sized(2).feed(b"headok!", 4) == 6
