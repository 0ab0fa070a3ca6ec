"""Request heads that a Go server refuses are refused here too, so that nobody in between can read them differently."""

from __future__ import annotations

import pytest

from router.http1.parser import HeadError, RequestHead

_HOST = b"Host: localhost\r\n"


def _parsed(line: bytes, fields: bytes = _HOST, *, cut_at: int = 0) -> RequestHead:
    raw = line + b"\r\n" + fields + b"\r\n"
    head = RequestHead()
    if cut_at:
        assert head.feed(raw[:cut_at]) < 0
    assert head.feed(raw, cut_at) == len(raw)
    return head


@pytest.mark.parametrize("cut_at", [0, 3, 20, 30])
def test_an_ordinary_head_is_read_however_it_comes(cut_at: int) -> None:
    head = _parsed(b"POST /api/chat?a=%zz HTTP/1.1", cut_at=cut_at)
    assert (head.method, head.target) == (b"POST", b"/api/chat?a=%zz")


@pytest.mark.parametrize("cut_at", [0, 3, 20])
@pytest.mark.parametrize(
    "line",
    [
        b"POST  /api/chat HTTP/1.1",
        b"POST /api/chat  HTTP/1.1",
        b"POST /api/%zz/chat HTTP/1.1",
        b"POST /api/chat% HTTP/1.1",
        b"POST http://localhost:+1/api/chat HTTP/1.1",
        b"POST http://localhost:1e9/ HTTP/1.1",
    ],
)
def test_a_start_line_that_go_refuses_is_refused(line: bytes, cut_at: int) -> None:
    with pytest.raises(HeadError) as caught:
        _parsed(line, cut_at=cut_at)
    assert caught.value.status == 400


@pytest.mark.parametrize("host", [b"a, b", b"a/b", b'"a', b"a b", b"\xe4"])
def test_a_host_with_other_characters_is_refused(host: bytes) -> None:
    with pytest.raises(HeadError, match="Host"):
        _parsed(b"GET / HTTP/1.1", b"Host: " + host + b"\r\n")


@pytest.mark.parametrize(("expect", "is_refused"), [(b"", False), (b"100-Continue", False), (b"x", True)])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_only_the_expectation_of_http_is_met(version: bytes, expect: bytes, is_refused: bool) -> None:
    line, fields = b"GET / HTTP/" + version, _HOST + b"Expect: " + expect + b"\r\n"
    if not is_refused:
        assert _parsed(line, fields).method == b"GET"
        return
    with pytest.raises(HeadError) as caught:
        _parsed(line, fields)
    assert caught.value.status == 417
