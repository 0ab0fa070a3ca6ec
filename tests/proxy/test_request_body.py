"""Bodies are taken in whole, within their limit, and take no more room than they are long."""

from __future__ import annotations

import pytest

from router.errors import BodyTooLarge
from router.http1.parser import RequestHead
from router.proxy.request_body import LONG_BYTES, SMALL_PIECES_MAX, RequestBodyReader


def _head(framing: bytes) -> RequestHead:
    head = RequestHead()
    head.feed(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
    return head


def test_a_body_that_comes_byte_by_byte_is_kept_in_few_pieces() -> None:
    size = 50 * SMALL_PIECES_MAX
    intake = RequestBodyReader(_head(b"Content-Length: %d" % size), 2**20)
    for number in range(size):
        ahead = intake.feed(bytes((number % 256,)))
        assert (ahead is None) == (number < size - 1)
        assert len(intake.pieces) < 2 * SMALL_PIECES_MAX
    assert intake.joined() == bytes(number % 256 for number in range(size))


def test_chunks_of_one_byte_are_kept_in_few_pieces() -> None:
    intake = RequestBodyReader(_head(b"Transfer-Encoding: chunked"), 2**20)
    for _ in range(20 * SMALL_PIECES_MAX):
        assert intake.feed(b"1\r\nx\r\n") is None
    assert len(intake.pieces) < 2 * SMALL_PIECES_MAX
    assert intake.feed(b"0\r\n\r\nnext") == b"next"
    assert intake.joined() == b"x" * 20 * SMALL_PIECES_MAX


def test_pieces_that_are_counted_stay_as_they_are() -> None:
    intake = RequestBodyReader(_head(b"Content-Length: %d" % LONG_BYTES), 2**20)
    intake.holds_still = True
    for _ in range(2 * SMALL_PIECES_MAX):
        intake.feed(b"x")
    assert len(intake.pieces) == 2 * SMALL_PIECES_MAX


@pytest.mark.parametrize("framing", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
def test_more_than_the_limit_is_refused_as_soon_as_it_is_there(framing: bytes) -> None:
    intake = RequestBodyReader(_head(framing), 1000)
    with pytest.raises(BodyTooLarge):
        intake.feed(b"7d0\r\n" + b"x" * 1500 if b"chunked" in framing else b"x" * 1500)


def test_a_body_to_be_thrown_away_is_not_kept() -> None:
    intake = RequestBodyReader(_head(b"Content-Length: 10"), 1000, throw_away=True)
    assert intake.feed(b"x" * 9) is None
    assert intake.feed(b"xnext") == b"next"
    assert intake.pieces == []
