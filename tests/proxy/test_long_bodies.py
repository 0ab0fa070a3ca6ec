"""Long bodies go on while they still come, and only where what comes later could not have changed anything."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from tests.proxy.stage import LIMITS, MODEL, OK, Stage, Turn, by_turn, closing, replying, rests, staged
from tests.support.rawhttp import Connection, connect
from tests.support.waiting import eventually

_IMAGE = "x" * 600_000


def _raw(body: bytes, path: str = "/api/chat") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body


def _body(tail: str = "") -> bytes:
    messages = json.dumps([{"role": "user", "content": "what is it?", "images": [_IMAGE]}])
    return f'{{"model":"tiny","messages":{messages},"stream":false{tail}}}'.encode()


async def _half(stage: Stage, connection: Connection, raw: bytes) -> None:
    """Sends half of it, and waits until some of that has gone on."""
    await connection.send(raw[: len(raw) // 2])
    await eventually(lambda: stage.upstream.received_bytes > 100_000, what="pieces at the server")


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_pieces_go_on_before_the_body_is_whole_and_the_last_only_then(path: str) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = _raw(_body(), path)
        await _half(stage, connection, raw)
        assert len(stage.controller.held) == 1
        assert stage.upstream.turns == []
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        (turn,) = stage.upstream.turns
        assert turn.body == _body()
        assert len(stage.controller.tickets) == 1
        await rests(stage)
        assert (await connection.call("POST", "/api/chat", _body())).status == 200
        assert stage.upstream.connections == 1


@pytest.mark.parametrize(
    ("tail", "sent"),
    [
        (',"keep_alive":"5m"', '"keep_alive":-1'),
        (',"options":{"num_gpu":3}', '"options":{}'),
        (',"options":{"num_ctx":4096}', '"num_ctx":8192'),  # the copy's
    ],
)
async def test_what_stands_further_back_is_heeded_all_the_same(tail: str, sent: str) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.catalog.models["other"] = replace(MODEL, name="other:latest")
        raw = _raw(_body(tail))
        await _half(stage, connection, raw)
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        first, second = stage.controller.tickets
        assert (first.model.name, second.model.name) == ("tiny:latest", "tiny:latest")
        (turn,) = stage.upstream.turns
        assert sent in turn.body.decode()
        assert turn.connection == 2
        assert stage.controller.lost == []
        await rests(stage)


@pytest.mark.parametrize("tail", [',"model":"other"', ',"MODEL":"other"', ',"mod\\u0065l":"other"'])
async def test_another_model_further_back_is_refused_and_the_slot_released(tail: str) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.catalog.models["other"] = replace(MODEL, name="other:latest")
        raw = _raw(_body(tail))
        await _half(stage, connection, raw)
        await connection.write(raw[len(raw) // 2 :])
        reply = await connection.reply()
        assert (reply.status, reply.header("X-Llamayard-Error")) == (400, "bad_request")
        assert (stage.upstream.turns, stage.controller.lost, stage.request_log.statuses) == ([], [], [400])
        await rests(stage)


_SETTINGS = '"options":{"num_ctx":8192,"temperature":0.7},"keep_alive":"5m"'


def _shaped(*, first: bool, image: str = _IMAGE, settings: str = _SETTINGS) -> bytes:
    """With its settings before the messages, as LangChain writes them, or after them, as Open WebUI does."""
    messages = json.dumps([{"role": "user", "content": "what is it?", "images": [image]}])
    before, after = (f"{settings},", "") if first else ("", f",{settings}")
    return f'{{"model":"tiny",{before}"messages":{messages}{after}}}'.encode()


@pytest.mark.parametrize("first", [True, False])
async def test_a_long_body_with_settings_asks_for_what_a_short_one_does(first: bool) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for image in ("short", _IMAGE, _IMAGE):
            body = _shaped(first=first, image=image)
            assert (await connection.call("POST", "/api/chat", body)).status == 200
            turn = stage.upstream.turns[-1]
            got, sent = json.loads(turn.body), json.loads(body)
            assert got == {**sent, "keep_alive": -1}
        last = {(t.model.name, t.options, t.keep_alive_seconds, t.is_flexible) for t in stage.controller.tickets[-1:]}
        whole = {(t.model.name, t.options, t.keep_alive_seconds, t.is_flexible) for t in stage.controller.tickets[:1]}
        assert last == whole
        await rests(stage)


@pytest.mark.parametrize("first", [True, False])
async def test_settings_are_replaced_while_the_body_comes(first: bool) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = _raw(_shaped(first=first))
        if not first:  # where the settings come last, they are expected to be those of the last long body
            await connection.send(raw)
            assert (await connection.reply()).status == 200
        requests, tickets = len(stage.upstream.turns), len(stage.controller.tickets)
        before = stage.upstream.received_bytes
        await connection.send(raw[: len(raw) // 2])
        await eventually(lambda: stage.upstream.received_bytes > before + 100_000, what="pieces at the server")
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        assert len(stage.controller.tickets) == tickets + 1
        (turn,) = stage.upstream.turns[requests:]
        assert turn.body == _shaped(first=first).replace(b'"5m"', b"-1  ")
        await rests(stage)


@pytest.mark.parametrize("settings", ['"keep_alive":5', '"keep_alive":"10m"', '"options":{"num_ctx":4096}', '"n":1'])
async def test_other_settings_than_the_last_ones_are_heeded(settings: str) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for each in (_SETTINGS, settings, _SETTINGS, settings):
            body = _shaped(first=False, settings=each)
            raw, tickets = _raw(body), len(stage.controller.tickets)
            await connection.send(raw[: len(raw) // 2])
            await eventually(lambda count=tickets: len(stage.controller.tickets) > count, what="an early start")
            await connection.write(raw[len(raw) // 2 :])
            assert (await connection.reply()).status == 200
            sent, got = json.loads(body), json.loads(stage.upstream.turns[-1].body)
            assert got.pop("keep_alive", None) == (-1 if "keep_alive" in sent else None)
            if "options" in sent:
                assert got["options"]["num_ctx"] == 8192
            assert stage.controller.tickets[-1].keep_alive_seconds == {
                _SETTINGS: 300.0, '"keep_alive":5': 5.0, '"keep_alive":"10m"': 600.0,
            }.get(each)  # fmt: skip
            await rests(stage)


@pytest.mark.parametrize("tail", [b"", b',"model":"other"', b',"MODEL":"other"'])
async def test_a_server_gets_no_whole_value_before_it_is_understood(tail: bytes) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        value = _body()[:-1] + tail + b"}"
        raw = _raw(value + b" " * 300_000)
        await connection.send(raw[:-10])
        await eventually(lambda: stage.upstream.received_bytes > 100_000, what="pieces at the server")
        assert stage.upstream.received_bytes < raw.index(b"\r\n\r\n") + len(value)
        await connection.write(raw[-10:])
        assert (await connection.reply()).status == (400 if tail else 200)
        await rests(stage)


async def test_a_body_that_is_not_json_after_all_gets_the_servers_own_words() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nwords")
        raw = _raw(_body()[:-1] + b"!")
        await _half(stage, connection, raw)
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).body == b"words"
        await rests(stage)


async def test_a_slow_sender_keeps_no_slot() -> None:
    async with (
        staged(limits=replace(LIMITS, upload_slot_timeout_seconds=0.2)) as stage,
        connect(stage.address) as connection,
    ):
        raw = _raw(_body())
        await _half(stage, connection, raw)
        await eventually(lambda: not stage.controller.held, what="the slot to be given back")
        await eventually(lambda: stage.upstream.open == 0, what="the server to be told")
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        assert stage.upstream.turns[-1].body == _body()
        await rests(stage)


async def test_a_body_that_stops_coming_gives_its_early_slot_back() -> None:
    limits = replace(LIMITS, body_timeout_seconds=0.2, upload_slot_timeout_seconds=30.0)
    async with staged(limits=limits) as stage, connect(stage.address) as connection:
        await _half(stage, connection, _raw(_body()))
        assert (await connection.reply()).status == 408
        await rests(stage)
        await eventually(lambda: stage.upstream.open == 0, what="the server's connection to be cut")


async def test_without_a_free_slot_the_body_is_waited_for_first() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        raw = _raw(_body())
        await connection.send(raw[: len(raw) // 2])
        await eventually(lambda: stage.controller.cancelled == 1, what="the first try to be withdrawn")
        stage.controller.urls = [stage.upstream.url]
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        await rests(stage)


async def test_a_client_that_leaves_within_its_body_leaves_nothing_behind() -> None:
    async with staged() as stage:
        async with connect(stage.address) as connection:
            await _half(stage, connection, _raw(_body()))
        await rests(stage)
        await eventually(lambda: stage.upstream.open == 0, what="the server to be told")
        assert stage.request_log.statuses == [499]


async def test_a_server_that_dies_within_the_body_is_replaced() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = _raw(_body())
        await _half(stage, connection, raw)
        stage.upstream.transports[0].abort()
        await eventually(lambda: len(stage.controller.lost) == 1, what="the loss")
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        assert stage.upstream.turns[-1].body == _body()
        await rests(stage)


async def test_a_server_that_dies_after_the_body_is_tried_again() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = by_turn(closing, replying(OK))
        raw = _raw(_body())
        await _half(stage, connection, raw)
        await connection.write(raw[len(raw) // 2 :])
        assert (await connection.reply()).status == 200
        assert [len(turn.body) for turn in stage.upstream.turns] == [len(_body())] * 2
        await rests(stage)


async def test_a_server_may_answer_before_the_body_has_come() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        await _half(stage, connection, _raw(_body()))
        stage.upstream.transports[0].write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nno!")
        reply = await connection.reply()
        assert (reply.status, reply.body, reply.header("Connection")) == (413, b"no!", "close")
        await connection.write(b"x" * 10_000)
        assert await connection.at_eof()
        await rests(stage)
        assert stage.request_log.statuses == [413]


async def test_a_server_that_takes_nothing_stops_its_client() -> None:
    limits = replace(LIMITS, max_body_bytes=2**26)
    async with staged(limits=limits) as stage, connect(stage.address, 30.0) as connection:
        image = b"y" * 40_000_000
        body = b'{"model":"tiny","messages":[{"role":"user","content":"x","images":["' + image + b'"]}]}'
        raw = _raw(body)
        await _half(stage, connection, raw[:1_000_000])
        stage.upstream.transports[0].pause_reading()
        sending = asyncio.ensure_future(connection.write(raw[500_000:]))
        for _ in range(2000):
            await asyncio.sleep(0)
        assert not sending.done()
        stage.upstream.transports[0].resume_reading()
        await sending
        assert (await connection.reply()).status == 200
        assert stage.upstream.turns[-1].body == body
        await rests(stage)


async def test_an_answer_that_streams_is_not_kept_from_coming_by_a_long_body() -> None:
    async def script(turn: Turn) -> None:
        await turn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n")

    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = script
        await connection.send(_raw(_body()))
        assert (await connection.reply()).chunks == (b"abc",)
        await rests(stage)
