"""A head that need not be parsed again says what a parse of it would say, and comes from where the first came from."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.domain.model import BlobDigest
from router.http1.parser import HeadError, RequestHead
from router.proxy.head_cache import HEAD_BYTES_MAX, HEADS_MAX, PLANS_MAX, HeadCache, HeadFacts
from router.proxy.server import ProxyServer
from tests.proxy.stage import MODEL, pipeline_with
from tests.proxy.wire import URL, Bench

_PEER = "127.0.0.1"
_HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\nX-Key: %s\r\n\r\n"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

_LINES = st.lists(
    st.sampled_from(
        (
            b"Host: localhost",
            b"Content-Type: application/json",
            b"Connection: close",
            b"Expect: 100-continue",
            b"X-Odd: Content-Length: 4",
            b"x-content-length: 4",
            b"Transfer-Encoding: chunked",
        )
    ),
    max_size=4,
    unique=True,
)
_NAMES = st.sampled_from((b"Content-Length: ", b"content-length: ", b"CONTENT-LENGTH: ", b"Content-length:", b""))
_DIGITS = st.sampled_from(
    (b"0", b"5", b"007", b"12345", b"1" * 15, b"1" * 16, b"+5", b"-1", b"0x5", b"5 5", b"5,5", b"")
)
_VERSIONS = st.sampled_from((b"1.1", b"1.1", b"1.0"))


def _parsed(raw: bytes) -> RequestHead | None:
    head = RequestHead()
    try:
        return head if head.feed(raw) == len(raw) else None
    except HeadError:
        return None


def _said(head: RequestHead) -> tuple[object, ...]:
    headers = [pair for pair in head.headers if pair[0].lower() != b"content-length"]
    return (
        (head.method, head.target, head.minor, headers, head.hosts, head.text("content-type")),
        (head.length, head.chunked, head.keep_alive, head.has_body, head.expects_continue),
    )


@given(
    _VERSIONS, _LINES, _NAMES, st.integers(0, 4), _DIGITS, _DIGITS, st.sampled_from((b"", b"\r\nContent-Length: 9\r\n"))
)
@settings(max_examples=1000)
def test_a_known_head_says_what_a_parse_of_it_says(
    version: bytes, lines: list[bytes], name: bytes, place: int, first: bytes, second: bytes, body: bytes
) -> None:
    def head(digits: bytes) -> bytes:
        all_lines = [*lines[:place], *([name + digits] if name else []), *lines[place:]]
        return b"\r\n".join((b"POST /api/chat HTTP/" + version, *all_lines, b"", b""))

    known, before = HeadCache(), _parsed(head(first))
    if before is not None:
        known.remember(_PEER, before, head(first))
    found, parsed = known.find(_PEER, head(second) + body), _parsed(head(second))
    if found is not None:
        assert parsed is not None
        assert _said(found) == _said(parsed)
        assert found.raw == head(second)
    elif name in (b"Content-Length: ", b"content-length: ") and max(len(first), len(second)) < 16:
        assert before is None or parsed is None  # what differs in its length alone is found


def test_a_head_is_known_at_the_address_alone_that_it_came_from() -> None:
    known, raw = HeadCache(), _HEAD % (b"7", b"secret")
    head = _parsed(raw)
    assert head is not None
    known.remember(_PEER, head, raw)
    assert known.find(_PEER, raw) is head
    assert known.find("10.0.0.2", raw) is None
    assert known.find(_PEER, _HEAD % (b"7", b"other")) is None
    assert known.find(_PEER, raw[:-1]) is None


def test_what_was_used_last_is_kept_and_what_is_long_is_not() -> None:
    known = HeadCache()
    raws = [_HEAD % (b"7", b"%d" % number) for number in range(HEADS_MAX + 1)]
    for number, raw in enumerate(raws):
        head = _parsed(raw)
        assert head is not None
        known.remember(_PEER, head, raw)
        assert known.find(_PEER, raws[0]) is not None, number
    assert known.find(_PEER, raws[1]) is None
    assert known.find(_PEER, raws[2]) is not None
    long = _HEAD % (b"7", b"x" * HEAD_BYTES_MAX)
    head = _parsed(long)
    assert head is not None
    known.remember(_PEER, head, long)
    assert known.find(_PEER, long) is None


def _request(model: str, words: str) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": words}]}).encode()
    return _HEAD % (b"%d" % len(body), b"k") + body


def test_bodies_of_all_lengths_go_on_whole_whatever_came_before_them() -> None:
    async def check() -> None:
        bench = Bench()
        for words in ("a", "a" * 300, "", "b" * 29, "b" * 30):
            before, request = len(bench.to_server.out), _request("tiny", words)
            bench.ask([request[:-3], request[-3:]] if len(words) == 29 else [request])
            sent = bytes(bench.to_server.out[before:])
            head, _, body = sent.partition(b"\r\n\r\n")
            assert body == request.partition(b"\r\n\r\n")[2]
            assert b"Content-Length: %d" % len(body) in head
            assert head.lower().count(b"content-length") == 1
            bench.answer([_ANSWER])
        assert bench.request_log.statuses == [200] * 5

    asyncio.run(check())


def test_a_body_that_is_too_long_is_refused_though_shorter_ones_were_taken() -> None:
    async def check() -> None:
        bench = Bench()
        context = bench.proxy.context
        limits = replace(context.limits, max_body_bytes=200)
        bench.client = type(bench.client)(
            replace(context, limits=limits, pipeline=pipeline_with(limits)), ProxyServer(context)
        )
        bench.client.connection_made(bench.to_client)
        for words in ("a", "a" * 300, "a"):
            bench.ask([_request("tiny", words)])
            if bench.controller.held:
                bench.answer([_ANSWER])
        assert bench.request_log.statuses == [200, 413, 200]

    asyncio.run(check())


@pytest.mark.parametrize("count", [1, PLANS_MAX + 3])
def test_what_is_remembered_of_requests_is_little(count: int) -> None:
    async def check() -> None:
        bench = Bench()
        for number in range(count):
            name = f"m{number:02}"
            bench.catalog.models[name] = replace(MODEL, name=name, blob=BlobDigest(name))
            bench.ask([_request(name, "hello")])
            bench.answer([_ANSWER])
        head = bench.proxy.context.heads.find(_PEER, _request("m00", "hello"))
        assert head is not None
        facts = head.derived
        assert isinstance(facts, HeadFacts)
        assert set(facts.upstream_lines) == {URL}
        names = [b'"m%02d"' % number for number in range(count)]
        assert [settings[1] for settings in facts.plans] == names[-PLANS_MAX:]

    asyncio.run(check())
