"""What a client of the relay sees when all goes well, and what its server sees."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from router.domain.events import UnloadRequested
from router.domain.instance import InstanceName
from tests.proxy.stage import MODEL, OK, Stage, Turn, replying, rests, staged
from tests.support.rawhttp import call, connect, exchange, request_bytes
from tests.support.waiting import eventually

_ASK = {"model": "tiny", "prompt": "hi"}
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"f\r\n" + b'{"response":1}\n' + b"\r\n",
    b"f\r\n" + b'{"response":2}\n' + b"\r\n",
    b'32\r\n{"done":true,"prompt_eval_count":3,"eval_count":2}\r\n',
    b"0\r\n\r\n",
)


async def test_a_small_answer_is_relayed() -> None:
    async with staged() as stage:
        reply = await call(stage.address, "POST", "/api/generate", _ASK, (("X-Request-ID", "mine"),))
        assert (reply.status, reply.body, reply.end) == (200, b'{"done":true}', "complete")
        assert reply.header("X-Request-ID") == "mine"
        assert reply.header("X-Llamayard-Instance") == "gpu0"
        assert reply.header("Connection") is None
        (turn,) = stage.upstream.turns
        assert json.loads(turn.body) == _ASK
        assert turn.head.startswith(b"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:")
        assert stage.request_log.statuses == [200]
        await eventually(lambda: stage.is_at_rest, what="rest")


async def test_a_stream_is_relayed_chunk_by_chunk_and_counted() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(*_STREAM)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert [len(chunk) for chunk in reply.chunks] == [15, 15, 50]
        assert reply.chunked
        (entry,) = stage.request_log.entries
        record = entry[0]
        assert record is not None
        assert record.tail.endswith(b'"eval_count":2}')
        assert record.first_byte_at is not None
        await eventually(lambda: stage.is_at_rest, what="rest")


async def test_connections_on_both_sides_are_used_again() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(*_STREAM)
        for _ in range(3):
            assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        assert (stage.upstream.connections, stage.proxy.connection_count) == (1, 1)
        assert stage.pool.idle_count == 1


async def test_requests_for_both_halves_alternate_on_one_connection() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for _ in range(2):
            assert (await connection.call("POST", "/api/generate", _ASK)).body == b'{"done":true}'
            assert (await connection.call("GET", "/api/tags")).body == b"GET /api/tags 0"
            assert (await connection.call("POST", "/api/show", _ASK)).body == b"POST /api/show 33"
            assert (await connection.call("HEAD", "/api/tags")).status == 200
            assert (await connection.call("GET", "/chunked")).body == b"onetwo"
        assert len(stage.upstream.turns) == 2


async def test_pipelined_requests_of_both_halves_are_answered_in_order() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        request = [request_bytes("POST", "/api/generate", _ASK), request_bytes("GET", "/chunked"),
                 request_bytes("POST", "/early", b"x" * 10), request_bytes("POST", "/api/generate", _ASK)]  # fmt: skip
        await connection.send(b"".join(request * 2))
        bodies = [(await connection.reply()).body for _ in range(8)]
        assert bodies == [b'{"done":true}', b"onetwo", b"early", b'{"done":true}'] * 2


async def test_requests_that_come_byte_by_byte_are_understood() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        raw = request_bytes("POST", "/api/generate", _ASK) + request_bytes("GET", "/api/tags")
        await connection.send(raw[:1])
        for byte in raw[1:]:
            await connection.write(bytes((byte,)))
            await asyncio.sleep(0)
        assert (await connection.reply()).body == b'{"done":true}'
        assert (await connection.reply()).body == b"GET /api/tags 0"


async def test_a_chunked_request_goes_on_with_its_length() -> None:
    async with staged() as stage:
        body = json.dumps(_ASK).encode()
        raw = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw += b"5\r\n" + body[:5] + b"\r\n" + b"%x;x=1\r\n" % len(body[5:]) + body[5:] + b"\r\n0\r\nSum: 1\r\n\r\n"
        assert (await exchange(stage.address, raw)).status == 200
        (turn,) = stage.upstream.turns
        assert turn.body == body
        assert b"chunked" not in turn.head
        assert b"Content-Length: %d\r\n" % len(body) in turn.head


async def test_an_http_1_0_client_gets_a_stream_without_chunks() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(*_STREAM)
        body = json.dumps(_ASK).encode()
        raw = b"POST /api/generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        reply = await exchange(stage.address, raw)
        assert reply.header("Transfer-Encoding") is None
        assert reply.header("Connection") == "close"
        assert reply.body == b"".join(_STREAM[1][3:-2] for _ in "x") + _STREAM[2][3:-2] + _STREAM[3][4:-2]


async def test_an_http_1_0_client_that_asks_keeps_its_connection() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        body = json.dumps(_ASK).encode()
        raw = b"POST /api/generate HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        for _ in range(2):
            await connection.send(raw)
            reply = await connection.reply()
            assert (reply.header("Connection"), reply.body) == ("keep-alive", b'{"done":true}')


async def test_a_request_to_close_is_honoured() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        reply = await connection.call("POST", "/api/generate", _ASK, (("Connection", "close"),))
        assert reply.header("Connection") == "close"
        assert await connection.at_eof()


async def test_a_client_that_waits_for_our_word_gets_it() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        body = json.dumps(_ASK).encode()
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        await connection.send(head % len(body))
        assert (await connection.head()).status == 100
        await connection.write(body)
        assert (await connection.reply()).status == 200
        assert b"xpect" not in stage.upstream.turns[0].head


async def test_headers_of_one_connection_only_do_not_pass_in_either_direction() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(
            b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nX-End: 1\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )
        request = (("Connection", "X-Private, keep-alive"), ("X-Private", "1"), ("TE", "trailers"), ("X-Public", "1"))
        reply = await call(stage.address, "POST", "/api/generate", _ASK, request)
        head = stage.upstream.turns[0].head.lower()
        assert b"x-private" not in head
        assert b"\r\nte:" not in head
        assert b"x-public: 1" in head
        assert reply.header("X-Hop") is None
        assert reply.header("Keep-Alive") is None
        assert reply.header("X-End") == "1"


async def test_trailers_pass() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n"
        stage.upstream.script = replying(head, b"2\r\n{}\r\n0\r\nSum: ", b"5\r\n\r", b"\n")
        await connection.send(request_bytes("POST", "/api/generate", _ASK))
        await connection.head()
        assert await connection.chunk() == b"{}"
        await eventually(lambda: stage.is_at_rest, what="rest")
        assert stage.pool.idle_count == 1


async def test_interim_answers_pass_but_for_100() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        stage.upstream.script = replying(
            b"HTTP/1.1 100 Continue\r\n\r\n", hints + b"HTTP/1.1 102 Processing\r\n\r\n" + OK
        )
        await connection.send(request_bytes("POST", "/api/generate", _ASK))
        assert [(await connection.head()).status for _ in range(2)] == [103, 102]
        assert (await connection.reply()).status == 200


async def test_a_reply_that_lasts_until_its_close_ends_with_a_close() -> None:
    async with staged() as stage:

        async def script(turn: Turn) -> None:
            await turn.write(b"HTTP/1.1 200 OK\r\n\r\nall", b" of it")
            turn.transport.close()

        stage.upstream.script = script
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.body, reply.header("Connection")) == (b"all of it", "close")
        await eventually(lambda: stage.is_at_rest and stage.upstream.open == 0, what="rest")


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_bodies_end_with_their_heads(status: int) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(b"HTTP/1.1 %d Nothing\r\nX: 1\r\n\r\n" % status)
        for _ in range(2):
            await connection.send(request_bytes("POST", "/api/generate", _ASK))
            assert (await connection.head()).status == status
        assert stage.upstream.connections == 1


async def test_a_client_that_unloads_is_answered_here() -> None:
    async with staged() as stage:
        reply = await call(stage.address, "POST", "/api/generate", {"model": "tiny", "keep_alive": 0})
        assert reply.json()["done_reason"] == "unload"
        assert stage.controller.posted == [UnloadRequested(MODEL.blob)]
        assert stage.upstream.turns == []
        assert stage.request_log.statuses == [200]


async def test_keep_alive_is_the_routers_and_the_rest_is_the_clients() -> None:
    async with staged() as stage:
        body = b'{ "model": "tiny" , "prompt":"x",  "keep_alive":"5m", "options":{"num_gpu":1,"seed":2} }'
        assert (await call(stage.address, "POST", "/api/generate", body)).status == 200
        assert stage.controller.tickets[0].keep_alive_seconds == 300.0
        sent = json.loads(stage.upstream.turns[0].body)
        assert sent["keep_alive"] == -1
        assert sent["options"] == {"seed": 2}


@pytest.mark.parametrize("body", [b"{bad", b'{"prompt":"x"}', b'{"model":"unknown"}', b""])
async def test_what_cannot_be_routed_gets_the_servers_own_words(body: bytes) -> None:
    async with staged() as stage:
        stage.upstream.script = replying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nwords")
        reply = await call(stage.address, "POST", "/api/generate", body)
        assert (reply.status, reply.body) == (400, b"words")
        assert stage.upstream.turns[0].body == body
        assert stage.controller.tickets == []


async def test_a_model_that_is_not_known_yet_is_asked_for() -> None:
    async with staged() as stage:
        answer = stage.catalog.slow["new"] = asyncio.get_running_loop().create_future()
        async with connect(stage.address) as connection:
            await connection.send(request_bytes("POST", "/api/generate", {"model": "new", "prompt": "x"}))
            await eventually(lambda: stage.request_log.running == 1, what="the request")
            answer.set_result(MODEL)
            assert (await connection.reply()).status == 200


async def _waits(stage: Stage) -> None:
    await eventually(lambda: len(stage.controller.waiting) == 1, what="a ticket that waits")


async def test_a_ticket_may_wait_and_be_granted_later() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        await connection.send(request_bytes("POST", "/api/generate", _ASK))
        await _waits(stage)
        stage.controller.grant(stage.controller.tickets[0].id, stage.upstream.url)
        assert (await connection.reply()).status == 200
        await eventually(lambda: stage.is_at_rest, what="rest")


async def test_a_rejection_has_the_form_of_the_api() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.controller.urls = []
        await connection.send(request_bytes("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}))
        await _waits(stage)
        stage.controller.reject(stage.controller.tickets[0].id, "queue_full")
        reply = await connection.reply()
        assert (reply.status, reply.header("Retry-After")) == (503, "7")
        assert reply.json()["error"]["code"] == "queue_full"
        assert stage.request_log.entries[0][0].error_code == "queue_full"
        stage.controller.urls = [stage.upstream.url]
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200


async def test_a_browsers_page_is_judged_on_the_same_terms() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        allowed = await connection.call("POST", "/api/generate", _ASK, (("Origin", "http://localhost"),))
        assert allowed.header("Access-Control-Allow-Origin") == "http://localhost"
        refused = await connection.call("POST", "/api/generate", _ASK, (("Origin", "http://evil.example"),))
        assert refused.status == 403
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        assert len(stage.upstream.turns) == 2


async def test_absolute_targets_and_escaped_paths_are_leased_too() -> None:
    async with staged() as stage:
        body = json.dumps(_ASK).encode()
        for target in (b"http://localhost/api/generate?x=1", b"/api/gener%61te", b"/api/generate?a=b"):
            raw = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (target, len(body)) + body
            assert (await exchange(stage.address, raw)).status == 200
        assert len(stage.controller.tickets) == 3
        assert stage.upstream.turns[0].head.startswith(b"POST /api/generate?x=1 HTTP/1.1\r\n")


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
async def test_answers_of_the_library_without_a_body_keep_the_connection(method: str) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for _ in range(3):
            reply = await connection.call(method, "/empty", b"some" if method == "DELETE" else None)
            assert (reply.status, reply.header("Content-Length")) == (200, "0")
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200


async def test_a_bodiless_request_to_close_is_honoured_by_both_halves() -> None:
    async with staged() as stage:
        for path in ("/api/generate", "/empty"):
            async with connect(stage.address) as connection:
                await connection.call("POST", path, None, (("Connection", "close"),))
                assert await connection.at_eof()


_REFUSED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings"])
@pytest.mark.parametrize(
    "options", [{"num_ctx": "32768"}, {"num_gpu": "all"}, {"main_gpu": True}, {"use_mmap": 1}, {"num_batch": [1]}]
)
async def test_an_option_of_the_wrong_type_goes_to_a_server_unchanged_and_without_a_slot(
    path: str, options: dict[str, Any]
) -> None:
    body = {"model": "tiny", "prompt": "x", "input": "x", "messages": [], "options": options, "keep_alive": 60}
    async with staged() as stage:
        stage.upstream.script = replying(_REFUSED)
        reply = await call(stage.address, "POST", path, body)
        assert (reply.status, reply.body, stage.controller.tickets) == (500, b"{}", [])
        assert json.loads(stage.upstream.turns[0].body) == body
        await rests(stage)


async def test_an_option_of_the_wrong_type_is_refused_by_the_router_where_no_server_may_be_asked() -> None:
    async with staged() as stage:
        stage.catalog.models["tiny"] = replace(MODEL, is_shared=False, attached_on=frozenset({InstanceName("far")}))
        reply = await call(stage.address, "POST", "/api/generate", {**_ASK, "options": {"num_gpu": "all"}})
        assert (reply.status, reply.json()) == (500, {"error": 'option "num_gpu" must be of type integer'})
        assert stage.upstream.turns == []
        await rests(stage)


async def test_targets_in_absolute_form_are_served_by_both_halves() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for _ in range(2):
            assert (await connection.call("POST", "http://localhost/api/generate?x=1", _ASK)).status == 200
            assert (await connection.call("GET", "http://localhost/api/tags?x=1")).body == b"GET /api/tags 0"
            assert (await connection.call("POST", "http://localhost/api/show", _ASK)).body == b"POST /api/show 33"
        assert stage.handed == ["/api/tags", "/api/show"] * 2
        assert all(turn.head.startswith(b"POST /api/generate?x=1 HTTP/1.1\r\n") for turn in stage.upstream.turns)
        assert all(turn.head.lower().count(b"\r\nhost:") == 1 for turn in stage.upstream.turns)
        raw = b"GET http://127.0.0.1:99/api/tags HTTP/1.0\r\n\r\n"
        assert (await exchange(stage.address, raw)).status == 200
