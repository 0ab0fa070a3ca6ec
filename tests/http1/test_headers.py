"""What of a head goes on to the server, and what of its answer to the client."""

from __future__ import annotations

from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http1.headers import header, reply_headers, request_id, request_lines, upstream_headers

Pairs = list[tuple[bytes, bytes]]


def test_what_concerns_the_message_goes_on_in_its_order_and_spelling() -> None:
    raw: Pairs = [(b"User-Agent", b"curl/8"), (b"ACCEPT", b"*/*"), (b"X-Two", b"1"),
                  (b"x-two", b"2"), (b"Content-Type", b"application/json"), (b"Content-Encoding", b"zstd")]  # fmt: skip
    assert upstream_headers(raw) == raw


@pytest.mark.parametrize(
    "name",
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer", "Upgrade", "Expect",
     "Origin", "Proxy-Authorization", "Authorization", "X-Api-Key",
     "Proxy-Connection", "Access-Control-Request-Method", "X-Llamayard-Reason"],
)  # fmt: skip
def test_what_concerns_this_connection_or_this_endpoint_does_not(name: str) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert upstream_headers([(b"A", b"1"), (spelling.encode(), b"x")]) == [(b"A", b"1")]


def test_what_connection_names_is_this_connections_own() -> None:
    raw = [(b"Connection", b"close, X-Mine"), (b"connection", b" x-too ,"), (b"X-Mine", b"1"), (b"X-TOO", b"2"),
           (b"X-Other", b"3")]  # fmt: skip
    assert upstream_headers(raw) == [(b"X-Other", b"3")]
    assert reply_headers(raw) == [(b"X-Other", b"3")]


def test_connection_cannot_name_away_what_the_message_is() -> None:
    raw = [(b"Connection", b"content-type, content-encoding, content-length"), (b"Content-Type", b"a/b"),
           (b"Content-Encoding", b"zstd")]  # fmt: skip
    assert upstream_headers(raw) == raw[1:]
    assert reply_headers([*raw, (b"Content-Length", b"5")]) == [*raw[1:], (b"Content-Length", b"5")]


def test_the_servers_host_comes_first_and_the_clients_never_goes_on() -> None:
    raw = [(b"A", b"1"), (b"Host", b"evil.example")]
    assert upstream_headers(raw, b"127.0.0.1:1") == [(b"Host", b"127.0.0.1:1"), (b"A", b"1")]


def test_the_lines_of_a_request_have_no_framing_of_the_clients() -> None:
    lines = request_lines(b"POST", b"/api/chat?a=1", [(b"Content-Length", b"999"), (b"A", b"1")], b"h")
    assert lines == b"POST /api/chat?a=1 HTTP/1.1\r\nHost: h\r\nA: 1\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        {"method": b"POST\r\nX: 1"},
        {"method": b"PO ST"},
        {"target": b"/ HTTP/1.1\r\nX: 1"},
        {"target": b"/a b"},
        {"raw": [(b"A", b"1\r\nX: 2")]},
        {"raw": [(b"A\n", b"1")]},
        {"raw": [(b"A", b"1\x00")]},
        {"host": b"h\r\nX: 1"},
    ],
)
def test_a_head_that_would_say_more_than_it_should_is_not_written(parts: dict[str, Any]) -> None:
    whole: dict[str, Any] = {"method": b"POST", "target": b"/", "raw": [], "host": b"h"}
    with pytest.raises(ValueError, match="is not sent"):
        request_lines(**{**whole, **parts})


def test_an_answer_with_both_framings_keeps_the_chunks() -> None:
    raw = [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked"), (b"Content-Type", b"a/b")]
    assert reply_headers(raw) == [(b"Content-Type", b"a/b")]
    assert reply_headers(raw, keep_framing=True) == raw[1:]


def test_an_answer_keeps_its_length_and_all_that_the_client_may_use() -> None:
    raw = [(b"Content-Length", b"5"), (b"Set-Cookie", b"a"), (b"Set-Cookie", b"b"), (b"Vary", b"Origin"),
           (b"Cache-Control", b"no-cache")]  # fmt: skip
    assert reply_headers(raw) == raw
    assert reply_headers([*raw, (b"Connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5")]) == raw


def test_the_first_of_several_values_counts() -> None:
    raw = [(b"A", b"0"), (b"CONTENT-type", b"1"), (b"content-type", b"2")]
    assert header(raw, b"content-type") == b"1"
    assert header(raw, b"x") is None


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [("abc-123", "abc-123"), ("a b\r\nc", "abc"), ("x" * 500, "x" * 128), ("é", "new"), ("", "new"), (None, "new")],
)
def test_a_clients_request_id_is_kept_as_far_as_it_is_fit(given_id: str | None, kept: str) -> None:
    assert request_id(given_id, lambda: "new") == kept
    assert request_id(None) != request_id(None)


TOKENS = st.sampled_from(
    (b"Host", b"host", b"Connection", b"X-A", b"x-b", b"TE", b"Content-Type", b"Content-Length", b"Transfer-Encoding",
     b"Proxy-X", b"Origin", b"Accept", b"X-Llamayard-Y", b"Expect")
)  # fmt: skip
VALUES = st.sampled_from((b"1", b"close", b"keep-alive, X-A", b"x-b", b"chunked", b"text/plain, */*", b"", b"\xff"))
HEADS = st.lists(st.tuples(TOKENS, VALUES), max_size=10)


@given(HEADS)
def test_what_went_on_once_goes_on_again_unchanged_and_in_order(raw: Pairs) -> None:
    memoise = upstream_headers(raw)
    assert upstream_headers(memoise) == memoise
    rest = iter(raw)
    assert all(pair in rest for pair in memoise)
    back = reply_headers(raw)
    assert reply_headers(back) == back


@given(HEADS, st.sampled_from((b"GET", b"POST", b"DELETE")), st.integers(0, 10**12))
def test_a_strict_parser_reads_what_was_written_as_one_request(raw: Pairs, method: bytes, length: int) -> None:
    seen: Pairs = []

    class Protocol:
        def on_header(self, name: bytes, value: bytes) -> None:
            seen.append((name, value))

    parser = httptools.HttpRequestParser(Protocol())
    lines = request_lines(method, b"/api/chat", raw, b"127.0.0.1")
    parser.feed_data(b"%sContent-Length: %d\r\n\r\n" % (lines, length))
    assert parser.get_method() == method
    names = [name.lower() for name, _ in seen]
    assert names.count(b"host") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert [pair for pair in seen if pair[0].lower() in (b"x-a", b"accept")] == [
        pair for pair in upstream_headers(raw) if pair[0].lower() in (b"x-a", b"accept")
    ]
