"""Connections beyond the limit are refused at once, and those there are go on."""

from __future__ import annotations

from dataclasses import replace

from tests.proxy.stage import LIMITS, staged
from tests.support.rawhttp import connect, request_bytes
from tests.support.waiting import eventually


async def test_a_connection_too_many_gets_503_and_is_closed() -> None:
    request = request_bytes("POST", "/api/chat", {"model": "tiny", "messages": []})
    async with (
        staged(limits=replace(LIMITS, max_connections=2)) as stage,
        connect(stage.address, 10.0) as first,
        connect(stage.address, 10.0) as second,
    ):
        for connection in (first, second):
            await connection.send(request)
            assert (await connection.reply()).status == 200
        async with connect(stage.address, 10.0) as third:
            reply = await third.reply()
        assert (reply.status, reply.header("Retry-After"), reply.header("Connection")) == (503, "1", "close")
        assert b"server.max_connections" in reply.body
        await first.send(request)
        assert (await first.reply()).status == 200
        second.abort()
        await eventually(lambda: stage.proxy.connection_count == 1, what="the end of a connection")
        async with connect(stage.address, 10.0) as fourth:
            await fourth.send(request)
            assert (await fourth.reply()).status == 200
