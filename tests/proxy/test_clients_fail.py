"""What the relay does when a client leaves or its request cannot be taken, and that nothing is left over after it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.proxy.stage import LIMITS, MODEL, replying, rests, staged, then_waiting
from tests.support.rawhttp import call, connect, exchange, request_bytes
from tests.support.waiting import eventually

_ASK = {"model": "tiny", "prompt": "hi"}
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINE = b'f\r\n{"response":1}\n\r\n'
_DEAD = b'{"error":"llama runner process no longer running: 2"}'
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(_DEAD) + _DEAD


async def test_a_client_that_leaves_while_it_waits_takes_its_ticket_along() -> None:
    async with staged() as stage:
        stage.controller.urls = []
        for half in (False, True):
            async with connect(stage.address) as leaving:
                await leaving.send(request_bytes("POST", "/api/generate", _ASK))
                await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket")
                leaving.half_close() if half else leaving.abort()
                await rests(stage)
        assert stage.controller.cancelled == 2
        assert stage.request_log.statuses == [499, 499]


@pytest.mark.parametrize("pieces", [(), (_HEAD,), (_HEAD + _LINE,)])
async def test_a_client_that_leaves_ends_its_generation(pieces: tuple[bytes, ...]) -> None:
    async with staged() as stage:
        stage.upstream.script = then_waiting(*pieces)
        for half in (False, True):
            async with connect(stage.address) as leaving:
                await leaving.send(request_bytes("POST", "/api/generate", _ASK))
                await eventually(lambda: stage.controller.held and stage.upstream.open, what="a generation")
                if pieces:
                    await leaving.head()
                leaving.half_close() if half else leaving.abort()
                await eventually(lambda: stage.upstream.open == 0, what="the server to be told")
                await rests(stage)
        assert stage.upstream.cancelled == 2
        assert (stage.controller.lost, stage.request_log.statuses) == ([], [499, 499])


async def test_a_client_that_leaves_while_its_model_is_looked_up_is_forgotten() -> None:
    async with staged() as stage:
        stage.catalog.slow["new"] = asyncio.get_running_loop().create_future()
        async with connect(stage.address) as leaving:
            await leaving.send(request_bytes("POST", "/api/generate", {"model": "new", "prompt": "x"}))
            await eventually(lambda: stage.request_log.running == 1, what="the request")
        await rests(stage)
        stage.catalog.slow["new"].set_result(MODEL)
        await asyncio.sleep(0)
        assert stage.controller.tickets == []


async def test_a_client_that_leaves_within_its_body_is_forgotten() -> None:
    async with staged() as stage:
        async with connect(stage.address) as leaving:
            await leaving.send(request_bytes("POST", "/api/generate", _ASK)[:-3])
            await eventually(lambda: stage.request_log.running == 1, what="the request")
        await rests(stage)
        assert (stage.request_log.statuses, stage.upstream.turns) == ([499], [])


async def test_a_client_that_sent_ahead_and_left_is_noticed() -> None:
    async with staged() as stage:
        stage.controller.urls = []
        async with connect(stage.address) as leaving:
            await leaving.send(request_bytes("POST", "/api/generate", _ASK) * 2)
            await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket")
        await rests(stage)
        assert stage.request_log.statuses == [499]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"POST /api/generate HTTP/1.1\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\nHost: a\n\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /api/generate HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
        (b"CONNECT /v1/models/a:b HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"POST /api/generate HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"POST /api/generate HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000, 431),
        (b"BREW /api/generate HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
async def test_heads_that_cannot_be_taken_are_told_so_and_end_the_connection(raw: bytes, status: int) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        await connection.send(raw + request_bytes("POST", "/api/generate", _ASK))
        reply = await connection.reply()
        assert (reply.status, reply.header("Connection")) == (status, "close")
        assert await connection.at_eof()
        assert stage.upstream.turns == []
        await rests(stage)


async def test_a_malformed_chunk_ends_the_connection_before_anything_is_sent_on() -> None:
    async with staged() as stage:
        raw = (
            b'POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\nxx\r\n'
        )
        reply = await exchange(stage.address, raw)
        assert (reply.status, stage.upstream.turns, stage.request_log.running) == (400, [], 0)


async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    async with staged(limits=replace(LIMITS, max_body_bytes=1000)) as stage:
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n"
        for framing in (b"Content-Length: 9999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n800\r\n" + b" " * 2048):
            async with connect(stage.address) as connection:
                await connection.send(head + framing)
                reply = await connection.reply()
                assert (reply.status, reply.header("Connection")) == (413, "close")
                await connection.write(b" " * 100_000)
                assert await connection.at_eof()
        assert stage.request_log.statuses == [413, 413]


async def test_a_short_body_of_a_refused_request_is_read_and_its_connection_kept() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = request_bytes("POST", "/api/generate", _ASK, (("Origin", "http://evil.example"),))
        await connection.send(raw[:-5])
        await connection.write(raw[-5:])
        assert (await connection.reply()).status == 403
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        packed = await connection.call("POST", "/v1/completions", b"....", (("Content-Encoding", "zstd"),))
        assert packed.status == 400
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200


async def test_a_client_that_awaits_our_word_is_refused_instead() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
        await connection.send(head + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        reply = await connection.reply()
        assert (reply.status, reply.header("Connection")) == (403, "close")


async def test_the_library_may_answer_before_a_body_has_come() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = request_bytes("POST", "/early", b"x" * 1000)
        await connection.send(raw[:-900])
        assert (await connection.reply()).body == b"early"
        await connection.write(raw[-900:])
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200


async def test_a_half_closed_client_of_the_library_gets_its_answer() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        await connection.send(request_bytes("GET", "/api/tags"))
        connection.half_close()
        assert (await connection.reply()).body == b"GET /api/tags 0"
        assert await connection.at_eof()


async def test_a_body_with_broken_chunks_is_logged_with_the_status_that_was_sent() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await connection.send(head + b"5\r\nabc")
        await connection.write(b"defgh\r\n")
        assert (await connection.reply()).status == 400
        assert stage.request_log.statuses == [400]


@pytest.mark.parametrize("header", ["Host", "Origin"])
async def test_a_refused_host_or_origin_is_recorded_with_its_value(header: str) -> None:
    async with staged() as stage:
        host = "evil.example" if header == "Host" else "localhost"
        origin = (("Origin", "http://evil.example"),) if header == "Origin" else ()
        reply = await exchange(stage.address, request_bytes("POST", "/api/generate", _ASK, origin, host))
        assert (reply.status, reply.body, reply.header("X-Llamayard-Error")) == (403, b"", "forbidden")
        (record, status) = stage.request_log.entries[0]
        assert (status, record.error_code) == (403, "forbidden")
        assert record.refusal.startswith(header)
        assert "evil.example" in record.refusal


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({"model": "nope"}, b"404 Not Found", "model_not_found"), (b"{bad", b"400 Bad Request", "bad_request")],
)
async def test_the_servers_words_for_a_request_without_a_model_get_our_code(
    body: object, status: bytes, code: str
) -> None:
    async with staged() as stage:
        stage.upstream.script = replying(b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\n\r\nwords")
        reply = await call(stage.address, "POST", "/api/generate", body)
        assert (reply.body, reply.header("X-Llamayard-Error")) == (b"words", code)
        assert stage.request_log.entries[0][0].error_code == code
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.body, reply.header("X-Llamayard-Error")) == (b"words", None)


@pytest.mark.parametrize(("pieces", "waited"), [((), 10.0), ((_HEAD + _LINE,), 10.0), ((), 1.0)])
async def test_a_client_that_gives_up_reports_how_long_it_saw_nothing(pieces: tuple[bytes, ...], waited: float) -> None:
    async with staged(limits=replace(LIMITS, first_byte_timeout_seconds=600.0, idle_timeout_seconds=600.0)) as stage:
        stage.upstream.script = then_waiting(*pieces)
        start = stage.controller.now()
        stage.controller.clock = lambda: start
        async with connect(stage.address) as leaving:
            await leaving.send(request_bytes("POST", "/api/generate", _ASK))
            await eventually(lambda: stage.controller.held and stage.upstream.open, what="a generation")
            if pieces:
                await leaving.head()
            stage.controller.clock = lambda: start + waited
            leaving.abort()
            await rests(stage)
        assert stage.controller.silent == ([waited] if waited >= 5.0 else [])
