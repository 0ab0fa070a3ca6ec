"""Bodies are taken in whole, within their limit, and take no more room than they are long."""

from __future__ import annotations

import pytest

from router.errors import BodyTooLarge
from router.http1.parser import RequestHead
from router.llm_api.limits import RequestLimits
from router.proxy.request_body import LONG_BODY_BYTES, SMALL_PIECES_MAX, RequestBodyReader


def _limits(max_body_bytes: int) -> RequestLimits:
    return RequestLimits(max_body_bytes, 60.0, 60.0, 60.0)


def _head(framing: bytes) -> RequestHead:
    head = RequestHead()
    head.feed(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
    return head


def test_a_body_that_comes_byte_by_byte_is_kept_in_few_pieces() -> None:
    size = 50 * SMALL_PIECES_MAX
    reader = RequestBodyReader(_head(b"Content-Length: %d" % size), _limits(2**20))
    for number in range(size):
        ahead = reader.feed(bytes((number % 256,)))
        assert (ahead is None) == (number < size - 1)
        assert len(reader.pieces) < 2 * SMALL_PIECES_MAX
    assert reader.joined() == bytes(number % 256 for number in range(size))


def test_chunks_of_one_byte_are_kept_in_few_pieces() -> None:
    reader = RequestBodyReader(_head(b"Transfer-Encoding: chunked"), _limits(2**20))
    for _ in range(20 * SMALL_PIECES_MAX):
        assert reader.feed(b"1\r\nx\r\n") is None
    assert len(reader.pieces) < 2 * SMALL_PIECES_MAX
    assert reader.feed(b"0\r\n\r\nnext") == b"next"
    assert reader.joined() == b"x" * 20 * SMALL_PIECES_MAX


def test_pieces_that_are_counted_stay_as_they_are() -> None:
    reader = RequestBodyReader(_head(b"Content-Length: %d" % LONG_BODY_BYTES), _limits(2**20))
    reader.pieces_frozen = True
    for _ in range(2 * SMALL_PIECES_MAX):
        reader.feed(b"x")
    assert len(reader.pieces) == 2 * SMALL_PIECES_MAX


@pytest.mark.parametrize("framing", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
def test_more_than_the_limit_is_refused_as_soon_as_it_is_there(framing: bytes) -> None:
    reader = RequestBodyReader(_head(framing), _limits(1000))
    with pytest.raises(BodyTooLarge):
        reader.feed(b"7d0\r\n" + b"x" * 1500 if b"chunked" in framing else b"x" * 1500)


def test_a_body_to_be_thrown_away_is_not_kept() -> None:
    reader = RequestBodyReader(_head(b"Content-Length: 10"), _limits(5), discards=True)
    assert reader.feed(b"x" * 9) is None
    assert reader.feed(b"xnext") == b"next"
    assert reader.pieces == []
