"""How long the relay waits, for whom, how much it keeps, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from router.llm_api.inference_request import ModelRules
from tests.proxy.stage import LIMITS, OK, Turn, replying, rests, staged, then_waiting
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually

_ASK = {"model": "tiny", "prompt": "hi"}
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINE = b'f\r\n{"response":1}\n\r\n'
_LAST_LINE = b'e\r\n{"done":true}\n\r\n'
_DEAD = b'{"error":"llama runner process no longer running: 2"}'
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(_DEAD) + _DEAD


_HASTY = replace(LIMITS, head_timeout_seconds=0.2, body_timeout_seconds=0.2, linger_timeout_seconds=0.2)


async def test_an_idle_connection_is_closed() -> None:
    async with (
        staged(limits=replace(LIMITS, connection_timeout_seconds=0.5)) as stage,
        connect(stage.address) as connection,
    ):
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        assert await connection.at_eof()


async def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async with staged(limits=_HASTY) as stage, connect(stage.address) as connection:
        await connection.send(b"POST /api/generate HTTP/1.1\r\nHost: a\r\n")
        assert (await connection.reply()).status == 408
        assert await connection.at_eof()


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async with staged(limits=_HASTY) as stage:
        for path in ("/api/generate", "/api/show"):
            async with connect(stage.address) as connection:
                await connection.send(request_bytes("POST", path, _ASK)[:-3])
                if path == "/api/generate":
                    assert (await connection.reply()).status == 408
                assert await connection.at_eof()
        await rests(stage)
        assert stage.request_log.statuses == [408]


async def test_a_silent_server_is_given_up_before_its_first_byte_and_after_it() -> None:
    limits = replace(LIMITS, first_byte_timeout_seconds=0.5, idle_timeout_seconds=0.2)
    async with staged(limits=limits) as stage:
        stage.upstream.script = then_waiting()
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (504, "wait_timeout")
        assert (
            len(stage.controller.lost) == 1
        )  # a runner that hangs, or a slot that is lost, does so for whoever comes next
        stage.upstream.script = then_waiting(_HEAD + _LINE)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert [sorted(line) for line in reply.lines()] == [["response"], ["error"]]
        assert len(stage.controller.lost) == 2
        await eventually(lambda: stage.upstream.open == 0, what="the server to be told")
        await rests(stage)


async def test_a_stream_that_nobody_reads_is_no_fault_of_its_server() -> None:
    limits = replace(LIMITS, idle_timeout_seconds=0.2)
    async with staged(limits=limits) as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(_HEAD, *[b"10000\r\n" + b"x" * 0x10000 + b"\r\n"] * 1000)
        await connection.send(request_bytes("POST", "/api/generate", _ASK))
        await eventually(lambda: len(stage.request_log.entries) == 1, what="the end of the patience with it")
        assert stage.controller.lost == []
        await rests(stage)


async def test_a_client_that_is_kept_waiting_gets_heartbeats_and_then_its_answer() -> None:
    limits = replace(LIMITS, first_byte_timeout_seconds=2.0)
    async with staged(limits=limits, rules=ModelRules(8192, heartbeat_seconds=0.05)) as stage:
        stage.controller.urls = []
        for upstream in ((_HEAD, _LAST_LINE, b"0\r\n\r\n"), (OK,)):
            async with connect(stage.address) as connection:
                stage.upstream.script = replying(*upstream)
                await connection.send(request_bytes("POST", "/api/generate", _ASK))
                assert (await connection.head()).status == 200
                assert await connection.chunk() == b" "
                stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
                reply = await connection.rest_after_head()
                assert (reply.end, len(reply.lines())) == ("complete", 1)
                await rests(stage)


async def test_what_goes_wrong_after_heartbeats_is_told_within_the_stream() -> None:
    limits = replace(LIMITS, first_byte_timeout_seconds=2.0)
    async with staged(limits=limits, rules=ModelRules(8192, heartbeat_seconds=0.05)) as stage:
        stage.controller.urls = []
        for refused in (True, False):
            async with connect(stage.address) as connection:
                stage.upstream.script = replying(
                    b'HTTP/1.1 400 Bad\r\nContent-Length: 16\r\n\r\n{"error":"words"}'[:-1]
                )
                await connection.send(request_bytes("POST", "/v1/chat/completions", _CHAT))
                assert (await connection.head()).status == 200
                assert await connection.chunk() == b": waiting\n\n"
                if refused:
                    stage.controller.reject(stage.controller.tickets[-1].id, "queue_full")
                else:
                    stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
                reply = await connection.rest_after_head()
                assert b'data: {"error":' in reply.body
                assert reply.end == "complete"
                await rests(stage)


async def test_a_client_that_takes_nothing_stops_its_server() -> None:
    async with staged() as stage:
        block = b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
        written = 0

        async def script(turn: Turn) -> None:
            nonlocal written
            turn.transport.set_write_buffer_limits(high=0)
            await turn.write(_HEAD)
            while not turn.transport.get_write_buffer_size():
                await turn.write(block)
                written += len(block)
            await asyncio.Event().wait()

        stage.upstream.script = script
        async with connect(stage.address) as connection:
            await connection.send(request_bytes("POST", "/api/generate", _ASK))
            before = -1
            while before != written:
                before = written
                for _ in range(200):
                    await asyncio.sleep(0)
            assert written < 64 * 2**20
            stage.upstream.turns[0].transport.abort()
        await rests(stage)


async def test_a_client_that_sends_far_ahead_is_not_read_without_end() -> None:
    async with staged() as stage:
        stage.controller.urls = []
        async with connect(stage.address, 5.0) as connection:
            await connection.send(request_bytes("POST", "/api/generate", _ASK))
            await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    while True:
                        await connection.write(request_bytes("POST", "/api/generate", _ASK) * 1000)
            stage.controller.urls = [stage.upstream.url]
            stage.controller.grant(stage.controller.tickets[0].id, stage.upstream.url)
            for _ in range(50):
                assert (await connection.reply()).status == 200


async def test_who_comes_while_it_drains_is_answered_once() -> None:
    async with staged() as stage:
        stage.controller.urls = []
        stage.proxy.drain()
        async with connect(stage.address) as late:
            await late.send(request_bytes("POST", "/api/generate", _ASK))
            await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket")
            stage.controller.reject(stage.controller.tickets[-1].id, "shutting_down")
            reply = await late.reply()
            assert (reply.status, reply.header("Retry-After"), reply.header("Connection")) == (503, "7", "close")
            assert await late.at_eof()


async def test_draining_lets_answers_end_and_closes_what_is_idle() -> None:
    async with staged() as stage, connect(stage.address) as idle, connect(stage.address) as busy:
        assert (await idle.call("POST", "/api/generate", _ASK)).status == 200
        stage.controller.urls = []
        await busy.send(request_bytes("POST", "/api/generate", _ASK))
        await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket")
        stage.proxy.drain()
        assert await idle.at_eof()
        stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
        reply = await busy.reply()
        assert (reply.status, reply.header("Connection")) == (200, "close")
        assert await busy.at_eof()
