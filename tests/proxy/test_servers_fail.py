"""What the relay does when a server or its answer fails, and that nothing is left over after it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import substitutes
from router.proxy.retry_budget import RETRIES_MIN
from tests.proxy.stage import MODEL, OK, Script, by_turn, closing, replying, rests, staged, then_closing
from tests.support.rawhttp import call, connect, request_bytes
from tests.support.waiting import eventually

_ASK = {"model": "tiny", "prompt": "hi"}
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINE = b'f\r\n{"response":1}\n\r\n'
_DEAD = b'{"error":"llama runner process no longer running: 2"}'
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(_DEAD) + _DEAD
_STOPPED = b'{"error":"model runner has unexpectedly stopped, this may be due to resource limitations"}'
_FAILED_SINCE_0_30 = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(_STOPPED) + _STOPPED


async def test_a_pooled_connection_that_was_closed_meanwhile_is_replaced_within_the_same_slot() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        stage.upstream.script = by_turn(replying(OK), closing, replying(OK))
        assert (await connection.call("POST", "/api/generate", _ASK)).status == 200
        assert (len(stage.upstream.turns), len(stage.controller.tickets), stage.controller.lost) == (3, 2, [])
        await rests(stage)


async def test_an_idle_connection_that_its_server_closes_is_forgotten() -> None:
    async with staged() as stage:
        stage.upstream.script = then_closing(OK)
        for _ in range(3):
            assert (await call(stage.address, "POST", "/api/generate", _ASK)).status == 200
            await eventually(lambda: stage.pool.idle_count == 0, what="the pool to be empty")
        assert len(stage.upstream.turns) == 3


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (closing, "connection_lost"),
        (replying(_FAILED), "runner_died"),
        (replying(_FAILED_SINCE_0_30), "runner_died"),
    ],
)
async def test_a_runner_that_died_before_its_answer_is_reported_and_the_request_tried_again(
    failing: Script, reason: str
) -> None:
    async with staged() as stage:
        stage.upstream.script = by_turn(failing, replying(OK))
        assert (await call(stage.address, "POST", "/api/generate", _ASK)).status == 200
        assert stage.controller.lost == [stage.controller.tickets[0].id]
        assert len(stage.controller.tickets) == 2
        assert stage.request_log.statuses == [200]
        assert stage.request_log.entries[0][0].retry_reasons == (reason,)
        await rests(stage)


async def test_after_three_attempts_the_servers_last_words_are_passed_on() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(_FAILED)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.body) == (500, _DEAD)
        assert len(stage.controller.lost) == 3
        await rests(stage)


async def test_an_error_of_a_living_runner_is_not_tried_again() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(b"HTTP/1.1 500 Internal Server Error\r\nTransfer-Encoding: chunked\r\n\r\n",
                                         b"3\r\nbad\r\n", b"2\r\n!\n\r\n0\r\n\r\n")  # fmt: skip
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.body, len(stage.upstream.turns)) == (500, b"bad!\n", 1)


_BUSY = b'{"error":"server busy, please try again. maximum pending requests exceeded"}'
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n" % len(_BUSY) + _BUSY


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_an_error_is_tried_elsewhere_where_another_replica_serves(status: int) -> None:
    async with staged(elsewhere=True) as stage:
        stage.upstream.script = by_turn(replying(_REFUSED.replace(b"503", b"%d" % status)), replying(OK))
        assert (await call(stage.address, "POST", "/api/generate", _ASK)).status == 200
        first, second = stage.controller.tickets
        assert (first.avoid, second.avoid) == (None, "gpu0")
        assert (second.arrived_at, second.deadline) == (first.arrived_at, first.deadline)
        assert stage.controller.failures == ["overloaded" if status == 503 else "error"]
        assert stage.controller.lost == []
        assert stage.request_log.entries[0][0].retry_reasons == ("server_error",)
        await rests(stage)


_WRONG = b'{"error":"option \\"temperature\\" must be of type float32"}'
_BLAMED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n" % len(_WRONG) + _WRONG


async def test_an_option_of_the_wrong_type_is_no_failure_of_the_server() -> None:
    async with staged(elsewhere=True) as stage:
        stage.upstream.script = replying(_BLAMED)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.body, len(stage.upstream.turns)) == (500, _WRONG, 1)
        assert stage.controller.failures == []
        await rests(stage)


async def test_an_error_that_all_replicas_give_is_passed_on_in_the_servers_words() -> None:
    async with staged(elsewhere=True) as stage:
        stage.upstream.script = replying(_REFUSED)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.body, len(stage.upstream.turns)) == (503, _BUSY, 3)
        await rests(stage)


async def test_retries_beyond_the_budget_are_not_made_and_the_error_is_passed_on() -> None:
    async with staged(elsewhere=True) as stage:
        stage.upstream.script = replying(_REFUSED)
        replies = [await call(stage.address, "POST", "/api/generate", _ASK) for _ in range(8)]
        assert {(reply.status, reply.body) for reply in replies} == {(503, _BUSY)}
        assert len(stage.upstream.turns) == 8 + RETRIES_MIN
        assert stage.request_log.entries[-1][0].is_retry_refused
        stage.upstream.script = closing
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (502, "instance_lost")
        await rests(stage)


async def test_an_error_of_the_client_is_no_failure_of_the_server() -> None:
    async with staged(elsewhere=True) as stage:
        stage.upstream.script = replying(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
        assert (await call(stage.address, "POST", "/api/generate", _ASK)).status == 400
        assert (len(stage.upstream.turns), stage.controller.failures) == (1, [])


async def test_a_server_that_cannot_be_reached_is_none() -> None:
    async with staged() as stage:
        stage.controller.urls = ["http://127.0.0.1:1"]
        reply = await call(stage.address, "POST", "/v1/completions", _ASK)
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_instance")
        assert len(stage.controller.lost) == 3
        assert stage.request_log.entries[0][0].retry_reasons == ("unreachable", "unreachable")
        await rests(stage)


async def test_a_stream_whose_server_dies_ends_with_an_error_line_and_the_next_request_is_served() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = by_turn(then_closing(_HEAD + _LINE), replying(OK))
        reply = await connection.call("POST", "/api/generate", _ASK)
        assert reply.end == "complete"
        assert [sorted(line) for line in reply.lines()] == [["response"], ["error"]]
        assert stage.request_log.entries[0][0].error_code == "instance_lost"
        # Nothing told the client not to send on: many pools do before they would see a close.
        assert (await connection.call("POST", "/api/generate", _ASK)).body == b'{"done":true}'
        await rests(stage)


@pytest.mark.parametrize(
    "pieces",
    [
        (_HEAD + _LINE + b'f\r\n{"resp',),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"some"),
        (_HEAD + _LINE, b"what is this?\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n"),
    ],
)
async def test_an_answer_that_cannot_be_ended_well_is_cut(pieces: tuple[bytes, ...]) -> None:
    async with staged() as stage:
        stage.upstream.script = then_closing(*pieces)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert reply.end in ("eof", "reset")
        await rests(stage)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nwhat?\r\n",
    ],
)
async def test_a_reply_that_cannot_be_read_is_an_error_of_the_server(head: bytes) -> None:
    async with staged() as stage:
        stage.upstream.script = replying(head)
        reply = await call(stage.address, "POST", "/api/generate", _ASK)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (502, "instance_lost")
        assert len(stage.upstream.turns) == 1
        await rests(stage)


async def test_bytes_after_a_reply_are_not_taken_for_the_next_one() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = replying(OK + OK)
        for _ in range(2):
            reply = await connection.call("POST", "/api/generate", _ASK)
            assert (reply.status, reply.body) == (200, b'{"done":true}')
        assert stage.upstream.connections == 2
        await rests(stage)


async def test_a_stream_that_shows_that_its_runner_died_reports_it() -> None:
    async with staged() as stage:
        words = b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'
        stage.upstream.script = replying(_HEAD + _LINE + b"%x\r\n%s\r\n0\r\n\r\n" % (len(words), words))
        assert (await call(stage.address, "POST", "/api/generate", _ASK)).end == "complete"
        assert len(stage.controller.lost) == 1


async def test_with_no_server_ready_the_request_is_told() -> None:
    async with staged(primary=False) as stage:
        reply = await call(stage.address, "POST", "/api/generate", {"model": "unknown"})
        assert (reply.status, reply.header("X-Llamayard-Error")) == (503, "no_instance")


async def test_a_younger_api_is_refused_clearly_by_servers_without_it() -> None:
    async with staged() as stage:
        reply = await call(stage.address, "POST", "/v1/messages", {"model": "tiny", "messages": []})
        assert (reply.status, reply.json()["type"]) == (404, "error")
        assert stage.request_log.statuses == [404]


async def test_another_model_answers_instead_where_the_operator_says_so() -> None:
    rules = ModelRules(8192, substitutes({}, {"big": (["tiny"], ["unknown_model", "queue_full"])}))
    async with staged(rules=rules) as stage:
        reply = await call(stage.address, "POST", "/api/generate", {"model": "big", "prompt": "x"})
        assert (reply.status, reply.header("X-Llamayard-Model")) == (200, "tiny")
        assert b'"tiny"' in stage.upstream.turns[0].body
        stage.catalog.models["big"] = replace(MODEL, name="big:latest")
        stage.controller.urls = []
        async with connect(stage.address) as connection:
            await connection.send(request_bytes("POST", "/api/generate", {"model": "big", "prompt": "x"}))
            await eventually(lambda: len(stage.controller.waiting) == 1, what="the first ticket")
            stage.controller.reject(stage.controller.tickets[-1].id, "queue_full")
            await eventually(lambda: stage.controller.tickets[-1].model.name == "tiny:latest", what="the second ticket")
            stage.controller.grant(stage.controller.tickets[-1].id, stage.upstream.url)
            reply = await connection.reply()
        assert (reply.status, reply.header("X-Llamayard-Fallback")) == (200, "queue_full")
        await rests(stage)
