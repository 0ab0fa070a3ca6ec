"""What comes through the relay is what a straight connection gives: recorded and generated, cut anywhere."""

from __future__ import annotations

import asyncio
import http.client
import io
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router.llm_api.routes import Kind, RouteTable
from router.llm_api.stream_end import RUNNER_DIED, TAIL_BYTES, StreamEnd, end_of_stream, tokens_of
from tests.contract.recording import Recording, recordings
from tests.proxy.wire import Bench

_REQUEST = b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n{"model":"tiny"}'
_OLD_REQUEST = b'POST /api/chat HTTP/1.0\r\nContent-Length: 16\r\n\r\n{"model":"tiny"}'
_OURS = ("x-request-id", "x-llamayard-instance", "server", "x-accel-buffering")
_HOP = ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-authenticate", "x-hop")


@dataclass(frozen=True, slots=True)
class Wired:
    """One message as its bytes: head lines without the start line, and the rest untouched."""

    start: bytes
    headers: tuple[tuple[str, str], ...]
    rest: bytes

    @classmethod
    def of(cls, raw: bytes) -> Wired:
        head, blank, rest = raw.partition(b"\r\n\r\n")
        assert blank, raw
        start, *lines = head.split(b"\r\n")
        pairs = [line.decode("latin-1").partition(":") for line in lines]
        return cls(start, tuple((name.lower(), value.strip()) for name, _, value in pairs), rest)

    def end_to_end(self) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.headers if name not in (*_HOP, *_OURS)]


def _payload(raw: bytes) -> bytes:
    """The data of a reply, as Python's own client reads it."""

    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(raw)

    reply = http.client.HTTPResponse(Socket())  # type: ignore[arg-type]
    reply.begin()
    return reply.read()


def _relayed(pieces: list[bytes], *, request: bytes = _REQUEST, then_close: bool = False) -> tuple[bytes, Bench]:
    bench = Bench()
    bench.ask([request])
    return bench.answer(pieces, then_close=then_close), bench


def _raw(recording: Recording) -> bytes:
    """The recorded reply's bytes as the server sent them."""
    reply = recording.reply
    fields = [f"{name}: {value}" for name, value in reply.head.headers]
    head = "\r\n".join([f"HTTP/1.1 {reply.status} {reply.head.reason}", *fields, "", ""]).encode()
    if not reply.chunked:
        return head + reply.body
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in reply.chunks) + b"0\r\n\r\n"


def _is_relayed(recording: Recording) -> bool:
    """A leased route's whole answer. One that tells of a dead runner is asked for again instead, and a stream without
    an end mark gets an error: see `test_stream_ends.py`."""
    method, target, _ = recording.request.split(b" ", 2)
    route = RouteTable().find(target.decode())
    died = recording.reply.status == 500 and any(words in recording.reply.body for words in RUNNER_DIED)
    leased = method == b"POST" and route is not None and route.kind is Kind.LEASED
    is_stream = (recording.reply.header("Content-Type") or "").startswith(("application/x-ndjson", "text/event-stream"))
    unmarked = is_stream and end_of_stream(target.decode(), recording.reply.body[-TAIL_BYTES:]) is StreamEnd.MISSING
    return leased and recording.reply.end == "complete" and not died and not unmarked


_RECORDED = [recording for recording in recordings() if _is_relayed(recording)]


@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.parametrize("recording", _RECORDED, ids=lambda r: r.name)
async def test_recorded_replies_pass_as_they_were_for_every_cut(recording: Recording) -> None:
    raw = _raw(recording)
    request = _REQUEST.replace(b"/api/chat", recording.request.split(b" ")[1])
    straight = Wired.of(raw)
    whole, bench = _relayed([raw], request=request)
    through = Wired.of(whole)
    assert (through.start, through.rest) == (straight.start, straight.rest)
    assert through.end_to_end() == straight.end_to_end()
    assert (bench.request_log.running, bench.controller.held, bench.pool.idle_count) == (0, set(), 1)
    step = max(1, len(raw) // 400)
    for cut in range(1, len(raw), step):
        again, bench = _relayed([raw[:cut], raw[cut:]], request=request)
        assert Wired.of(again).rest == straight.rest
        assert bench.pool.idle_count == 1
    again, _ = _relayed([bytes((byte,)) for byte in raw], request=request)
    assert Wired.of(again).rest == straight.rest


# --- generated ---------------------------------------------------------------------------------------------------

_FIELDS = st.lists(
    st.sampled_from(
        (
            *(b"Content-Type: application/x-ndjson", b"Date: now", b"X-A: 1", b"X-a:2", b"X-Hop: 1", b"X-Empty:"),
            *(b"Connection: X-Hop", b"Connection: keep-alive", b"Keep-Alive: timeout=5", b"Server: other"),
            *(b"Set-Cookie: a=b", b"Set-Cookie: c=d", b"X-Latin: \xe4\xf6"),
        )
    ),
    max_size=5,
)
_ODD_DATA = (b"\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b'{"x":1}\n')
_DATA = st.binary(min_size=1, max_size=60) | st.sampled_from(_ODD_DATA)
_INTERIM = (b"", b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n")


@st.composite
def _bodies(draw: st.DrawFn, *last: bytes) -> tuple[bytes, bytes, bool]:
    """The framing's header, the body's bytes (at their end `last`), and whether a close ends it."""
    chunks = draw(st.lists(_DATA, max_size=5))
    chunks += draw(st.integers(0, 3)) * chunks[-1:]
    chunks += last
    kind = draw(st.sampled_from(("chunked", "chunked", "sized", "close")))
    if kind == "sized":
        return b"Content-Length: %d" % len(b"".join(chunks)), b"".join(chunks), False
    if kind == "close":
        return b"X-Framing: none", b"".join(chunks), True
    extension = draw(st.sampled_from((b"", b"", b";a=b")))
    lines = [b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
    trailers = draw(st.sampled_from((b"", b"", b"X-Sum: 1\r\n")))
    return b"Transfer-Encoding: chunked", b"".join((*lines, b"0\r\n", trailers, b"\r\n")), False


@st.composite
def _replies(draw: st.DrawFn) -> tuple[bytes, bool]:
    status = draw(st.sampled_from((b"200 OK", b"200 OK", b"404 Not Found", b"500 Internal Server Error", b"299 ")))
    interim = draw(st.sampled_from(_INTERIM))
    fields: list[bytes] = [*draw(_FIELDS)]
    is_stream = b"Content-Type: application/x-ndjson" in fields
    framing, body, closes = draw(_bodies(b'\n{"done":true}\n') if is_stream else _bodies())
    fields.append(framing)
    head = b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(draw(st.permutations(fields))) + b"\r\n\r\n"
    return interim + head + body, closes


@st.composite
def _cut(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    cuts = sorted(draw(st.sets(st.integers(1, len(raw) - 1), max_size=10)))
    return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def _final(raw: bytes) -> bytes:
    """Without interim answers."""
    while raw.startswith((b"HTTP/1.1 100", b"HTTP/1.1 102")):
        raw = raw.partition(b"\r\n\r\n")[2]
    return raw


@given(_replies(), st.data())
@settings(max_examples=600)
def test_generated_replies_pass_as_they_are_for_every_cut(reply: tuple[bytes, bool], data: st.DataObject) -> None:
    raw, closes = reply
    assume(not any(words in raw for words in RUNNER_DIED))  # that would be asked for again
    pieces = data.draw(_cut(raw))

    async def check() -> None:
        straight = Wired.of(_final(raw))
        through, bench = _relayed(pieces, then_close=closes)
        final = Wired.of(_final(through))
        assert (final.start, final.rest) == (straight.start, straight.rest)
        named = any(value == "X-Hop" for name, value in straight.headers if name == "connection")
        kept = [pair for pair in straight.end_to_end() if not (named and pair[0] == "x-hop")]
        assert [p for p in final.end_to_end() if p[0] != "x-hop"] == [p for p in kept if p[0] != "x-hop"]
        assert (b"102 Processing" in through) == (b"102 Processing" in raw)
        assert (bench.request_log.running, bench.controller.held) == (0, set())
        old, _ = _relayed(pieces, request=_OLD_REQUEST, then_close=closes)
        assert b"ransfer-" not in old.partition(b"\r\n\r\n")[0]
        assert _payload(old) == _payload(_final(raw))

    asyncio.run(check())


@given(_replies(), st.data())
@settings(max_examples=300)
def test_a_reply_that_is_cut_short_never_looks_whole(reply: tuple[bytes, bool], data: st.DataObject) -> None:
    raw, closes = reply
    final_at = len(raw) - len(_final(raw))
    head_ends = raw.index(b"\r\n\r\n", final_at) + 4
    assume(not closes and len(raw) > head_ends and b" 500 " not in raw)  # that would be asked for again
    kept = data.draw(st.integers(head_ends, len(raw) - 1))

    async def check() -> None:
        through, bench = _relayed([raw[:kept]], then_close=True)
        whole = Wired.of(_final(raw)).rest
        if not bench.to_client.aborted:
            assert Wired.of(_final(through)).rest != whole
            assert b"error" in through
        assert (bench.request_log.running, bench.controller.held) == (0, set())

    asyncio.run(check())


_TOKEN_LINES = (
    b'{"model":"tiny","response":"a","done":false}\n',
    b'{"model":"tiny","response":"bb","done":false}\n',
    b'{"model":"tiny","response":"' + b"c" * 300 + b'","done":false}\n',
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
    b'22\r\n{"data":"of its own","done":false}\n',  # looks like a chunk, and is the inside of one
    b"x",
)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


@given(st.lists(st.sampled_from(_TOKEN_LINES), max_size=12), st.data())
@settings(max_examples=400)
def test_tokens_are_passed_and_counted_whether_they_come_one_by_one_or_cut(
    lines: list[bytes], data: st.DataObject
) -> None:
    """The usual way, a chunk a piece, is taken, left and taken again; the books come out the same."""
    last = b'{"done":true,"eval_count":7}\n'
    spelled = data.draw(st.sampled_from((b"%x\r\n%s\r\n", b"%X\r\n%s\r\n", b"%03x\r\n%s\r\n", b"%x;a=b\r\n%s\r\n")))
    chunks = [spelled % (len(line), line) for line in (*lines, last)]
    body = b"".join((*chunks, b"0\r\n\r\n"))
    pieces = [_STREAM_HEAD]
    for part in chunks:
        cut = data.draw(st.integers(0, len(part) - 1) | st.just(0))
        pieces += [part[:cut], part[cut:]] if cut else [part]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(pieces) - 1))
        pieces[at : at + 2] = [b"".join(pieces[at : at + 2])]

    async def check() -> None:
        through, bench = _relayed([*pieces, b"0\r\n\r\n"])
        assert Wired.of(through).rest == body
        assert (bench.request_log.running, bench.controller.held, bench.pool.idle_count) == (0, set(), 1)
        record = bench.request_log.entries[0][0]
        assert record is not None
        assert (record.chunks, record.bytes_out) == (len(chunks), len(body))
        assert tokens_of(record.tail).output == 7
        assert end_of_stream("/api/chat", record.tail) is StreamEnd.COMPLETE

    asyncio.run(check())


@given(st.lists(st.sampled_from(_TOKEN_LINES), min_size=1, max_size=6), st.data())
def test_a_stream_of_tokens_that_is_cut_short_never_looks_whole(lines: list[bytes], data: st.DataObject) -> None:
    chunks = [b"%x\r\n%s\r\n" % (len(line), line) for line in lines]
    kept = data.draw(st.integers(0, len(chunks[-1])))

    async def check() -> None:
        through, bench = _relayed([_STREAM_HEAD, *chunks[:-1], chunks[-1][:kept]], then_close=True)
        if not bench.to_client.aborted:
            assert b"error" in _payload(through)
        assert (bench.request_log.running, bench.controller.held) == (0, set())

    asyncio.run(check())


# --- requests ----------------------------------------------------------------------------------------------------

_ASKED_FIELDS = st.lists(
    st.sampled_from((b"Accept: */*", b"X-A: 1", b"x-a: 2", b"User-Agent: t/1", b"X-Author: k", b"X-Empty:")),
    max_size=4,
)
_ASKED_BODIES = st.sampled_from(
    (
        b'{"model":"tiny"}',
        b'{"model":"tiny","prompt":"a\\u00e4","options":{"seed":1}}',
        b'{ "model" : "tiny" , "x":[1,2] }\n',
    )
)


@given(_ASKED_FIELDS, _ASKED_BODIES, st.booleans(), st.data())
@settings(max_examples=400)
def test_requests_reach_the_server_as_they_are_however_they_are_cut(
    fields: list[bytes], body: bytes, chunked: bool, data: st.DataObject
) -> None:
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    head = b"\r\n".join((b"POST /api/generate?x=1 HTTP/1.1", b"Host: localhost", *fields, framing, b"", b""))
    pieces = data.draw(_cut(head + (chunks if chunked else body)))

    async def check() -> None:
        got = Wired.of(Bench().ask(pieces))
        assert got.start == b"POST /api/generate?x=1 HTTP/1.1"
        assert got.rest == body
        expected = [(n.lower(), v.strip()) for n, _, v in (f.decode().partition(":") for f in fields)]
        added = [("via", "1.1 llamayard-test"), ("content-length", str(len(body)))]
        assert got.end_to_end() == [("host", "127.0.0.1:9"), *expected, *added]

    asyncio.run(check())


@given(st.integers(1, 4), st.data())
def test_requests_sent_ahead_are_answered_one_by_one_however_they_are_cut(count: int, data: st.DataObject) -> None:
    pieces = data.draw(_cut(_REQUEST * count))

    async def check() -> None:
        bench = Bench()
        bench.ask(pieces)
        for number in range(1, count + 1):
            assert bench.to_server.out.count(b"POST /api/chat") == number
            bench.answer([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n%02d" % number])
            await asyncio.sleep(0)
        assert [part[-2:] for part in bytes(bench.to_client.out).split(b"HTTP/1.1 200 OK")[1:]] == [
            b"%02d" % number for number in range(1, count + 1)
        ]

    asyncio.run(check())
