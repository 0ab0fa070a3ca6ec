"""Bodies are taken in whole, within their limit, and take no more room than they are long."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from io import BytesIO

import pytest

from router.errors import BodyTooLarge
from router.http1.parser import RequestHead
from router.llm_api.limits import RequestLimits
from router.proxy.request_body import LONG_BODY_BYTES, RequestBodyReader


def _limits(max_body_bytes: int) -> RequestLimits:
    return RequestLimits(max_body_bytes, 60.0, 60.0, 60.0)


def _head(framing: bytes) -> RequestHead:
    head = RequestHead()
    head.feed(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
    return head


def _held_bytes(reader: RequestBodyReader) -> int:
    """Memory of the buffer, and of the pieces that are still to be appended to it."""
    return sum(sys.getsizeof(each) for each in gc.get_referents(reader) if isinstance(each, BytesIO | list))


@pytest.mark.parametrize("step", [1, 1000, 65_536])
def test_a_body_is_in_memory_once_however_small_its_pieces(step: int) -> None:
    size = 50_000 if step == 1 else 4_000_000
    body = b'{"model":"tiny","prompt":"' + b"x" * (size - 28) + b'"}'
    reader = RequestBodyReader(_head(b"Content-Length: %d" % size), _limits(2**23))
    for start in range(0, size, step):
        ahead = reader.feed(body[start : start + step])
        assert (ahead is None) == (start + step < size)
        assert _held_bytes(reader) < 1.15 * (start + step) + 4096
    assert reader.body() == body
    assert reader.body() is reader.body()
    assert reader.parse("/api/generate").model == "tiny"


def test_chunks_of_one_byte_are_in_memory_once() -> None:
    reader = RequestBodyReader(_head(b"Transfer-Encoding: chunked"), _limits(2**20))
    for _ in range(20_000):
        assert reader.feed(b"1\r\nx\r\n") is None
    assert _held_bytes(reader) < 1.15 * 20_000 + 4096
    assert reader.feed(b"0\r\n\r\nnext") == b"next"
    assert reader.body() == b"x" * 20_000


def test_parts_of_a_body_are_there_while_it_comes() -> None:
    reader = RequestBodyReader(_head(b"Content-Length: %d" % LONG_BODY_BYTES), _limits(2**20))
    for piece in (b"abc", b"defg"):
        reader.feed(piece)
    assert reader.stored_bytes == 7
    for start in range(8):
        for end in range(start, 8):
            assert b"".join(reader.parts(start, end)) == b"abcdefg"[start:end]
    reader.overwrite(2, b"XY")
    assert b"".join(reader.parts(1, 5)) == b"bXYe"
    reader.feed(b"h")
    assert b"".join(reader.parts(1, 8)) == b"bXYefgh"
    reader.release()
    assert reader.body() == b""


def test_parsing_a_long_body_takes_no_second_copy() -> None:
    """Not even with more strings than are followed while it comes, nor with one long list of numbers."""
    numbers = ",".join(["1"] * 3_000_000)
    messages = ",".join('{"role":"user","content":"%s"}' % ("x" * 1000) for _ in range(5000))
    for prompt in (f'"messages":[{messages}]', f'"messages":[{numbers}]'):
        body = f'{{"model":"tiny",{prompt}}}'.encode()
        reader = RequestBodyReader(_head(b"Content-Length: %d" % len(body)), _limits(2**23))
        tracemalloc.start()
        try:
            for start in range(0, len(body), 65_536):
                reader.feed(body[start : start + 65_536])
            assert reader.parse("/api/chat").model == "tiny"
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 1.15 * len(body) + 5 * 2**20


@pytest.mark.parametrize("framing", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
def test_more_than_the_limit_is_refused_as_soon_as_it_is_there(framing: bytes) -> None:
    reader = RequestBodyReader(_head(framing), _limits(1000))
    with pytest.raises(BodyTooLarge):
        reader.feed(b"7d0\r\n" + b"x" * 1500 if b"chunked" in framing else b"x" * 1500)


def test_a_body_to_be_thrown_away_is_not_kept() -> None:
    reader = RequestBodyReader(_head(b"Content-Length: 10"), _limits(5), discards=True)
    assert reader.feed(b"x" * 9) is None
    assert reader.feed(b"xnext") == b"next"
    assert (reader.stored_bytes, reader.body()) == (0, b"")
