"""A stream that asks for it is told where it stands while it waits, in comments; all others get the bytes as ever."""

from __future__ import annotations

from router.llm_api.inference_request import ModelRules
from router.scheduler.queue.wait_estimate import WaitEstimate
from tests.proxy.stage import MODEL, OK, Stage, replying, rests, staged, then_waiting
from tests.support.rawhttp import Connection, connect, request_bytes
from tests.support.waiting import eventually

_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
_ASK = {"model": "tiny", "prompt": "hi"}
_ON = (("X-Llamayard-Progress", "1"),)
_EVENT = b'data: {"choices":[]}\n\ndata: [DONE]\n\n'
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT),
    b"0\r\n\r\n",
)
_QUICK, _SLOW = ModelRules(8192, heartbeat_seconds=0.05), ModelRules(8192, heartbeat_seconds=1000.0)


def _stands(stage: Stage, position: int, seconds: float | None, reason: str = "") -> None:
    stage.controller.standing = WaitEstimate(position, seconds, reason)


async def test_a_stream_that_asks_is_told_at_once_where_it_stands() -> None:
    async with staged(rules=_SLOW) as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        _stands(stage, 3, 11.2, "2 of 2 slots\nare in use on gpu0")
        await connection.send(request_bytes("POST", "/v1/chat/completions", _CHAT, _ON))
        head = await connection.head()
        assert (head.status, head.header("Content-Type")) == (200, "text/event-stream")
        told = b": llamayard position=3 expected_wait_seconds=12 reason=2 of 2 slots are in use on gpu0\n\n"
        assert await connection.chunk() == told
        stage.upstream.script = replying(*_STREAM)
        stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
        reply = await connection.rest_after_head()
        assert (reply.body, reply.end) == (_EVENT, "complete")


async def test_it_is_told_again_and_again_until_its_answer_begins() -> None:
    async with staged(rules=_QUICK) as stage:
        stage.controller.urls = []
        async with connect(stage.address) as connection:
            _stands(stage, 2, None)
            await connection.send(request_bytes("POST", "/v1/chat/completions", _CHAT, _ON))
            await connection.head()
            assert await connection.chunk() == b": llamayard position=2\n\n"
            _stands(stage, 1, 0.0, "its turn")
            expected = b": llamayard position=1 expected_wait_seconds=0 reason=its turn\n\n"
            assert await _first_other(connection, b": llamayard position=2\n\n") == expected
            stage.upstream.script = then_waiting()
            stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
            has_it = b": llamayard position=0 expected_wait_seconds=0 reason=because; 0 of 1 slots were in use\n\n"
            assert await _first_other(connection, expected) == has_it
            await eventually(lambda: bool(stage.upstream.turns), what="the request at its server")
            stage.upstream.turns[0].transport.write(b"".join(_STREAM))
            assert await _first_other(connection, has_it) == _EVENT
        await rests(stage)


async def _first_other(connection: Connection, told: bytes) -> bytes | None:
    """The first chunk that is not this one."""
    chunk: bytes | None = told
    while chunk == told:
        chunk = await connection.chunk()
    return chunk


async def test_a_refusal_after_it_was_told_ends_the_stream_with_an_error() -> None:
    async with staged(rules=_SLOW) as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        _stands(stage, 1, None)
        await connection.send(request_bytes("POST", "/v1/chat/completions", _CHAT, _ON))
        await connection.head()
        stage.controller.reject(stage.controller.tickets[-1].id, "wait_timeout")
        reply = await connection.rest_after_head()
        assert reply.events()[-1]["error"]["code"] == "wait_timeout"


async def test_who_has_a_slot_at_once_gets_the_same_bytes_with_and_without_asking() -> None:
    async with staged(rules=_SLOW) as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(*_STREAM)
        named = (("X-Request-ID", "mine"),)
        replies = [
            await connection.call("POST", "/v1/chat/completions", _CHAT, (*named, *asking)) for asking in ((), _ON)
        ]
        assert replies[0] == replies[1]
        assert all(b"x-llamayard-progress" not in turn.head.lower() for turn in stage.upstream.turns)


async def test_whoever_does_not_ask_or_cannot_be_told_waits_as_ever() -> None:
    quiet = (*_ON, ("X-Llamayard-Heartbeat", "off"))
    for path, body, headers in (
        ("/v1/chat/completions", _CHAT, ()),
        ("/v1/chat/completions", _CHAT, (("X-Llamayard-Progress", "0"),)),
        ("/v1/chat/completions", _CHAT, quiet),
        ("/v1/chat/completions", {**_CHAT, "stream": False}, _ON),
        ("/api/generate", _ASK, _ON),
    ):
        async with staged(rules=_SLOW) as stage, connect(stage.address) as connection:
            stage.controller.urls = []
            await connection.send(request_bytes("POST", path, body, headers))
            await eventually(lambda stage=stage: bool(stage.controller.waiting), what="a ticket")
            stage.upstream.script = replying(OK)
            stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
            reply = await connection.reply()
            assert (reply.header("X-Llamayard-Instance"), reply.body) == ("gpu0", b'{"done":true}')


async def test_ndjson_is_kept_waiting_with_spaces_however_much_it_asks() -> None:
    async with staged(rules=_QUICK) as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        _stands(stage, 1, 1.0)
        await connection.send(request_bytes("POST", "/api/generate", _ASK, _ON))
        await connection.head()
        assert await connection.chunk() == b" "


async def test_a_ticket_carries_the_name_that_its_client_gave_the_request() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        await connection.call("POST", "/api/generate", _ASK, (("X-Request-ID", "mine"),))
        await connection.call("POST", "/api/generate", _ASK)
        first, second = stage.controller.tickets
        assert (first.model, first.request_id) == (MODEL, "mine")
        assert second.request_id not in ("", "mine")
