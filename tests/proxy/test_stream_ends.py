"""A stream that its server ends without the protocol's end mark ends with an error, and never looks complete."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.contract.recording import Recording, recordings
from tests.proxy.stage import OK, by_turn, replying, rests, staged, then_closing, then_waiting
from tests.support.rawhttp import call, connect, exchange, request_bytes
from tests.support.waiting import eventually

_NDJSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_TOKENS: dict[str, bytes] = {
    "/api/generate": b'{"model":"tiny","response":"a","done":false}\n',
    "/api/chat": b'{"model":"tiny","message":{"role":"assistant","content":"a"},"done":false}\n',
    "/v1/chat/completions": b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n',
    "/v1/completions": b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n',
    "/v1/responses": b'event: response.output_text.delta\ndata: {"delta":"a","type":"response.output_text.delta"}\n\n',
}
_MARKS: dict[str, bytes] = {
    "/api/generate": b'{"model":"tiny","response":"","done":true,"eval_count":1}\n',
    "/api/chat": b'{"model":"tiny","message":{"role":"assistant","content":""},"done":true,"eval_count":1}\n',
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/completions": b"data: [DONE]\n\n",
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
}
_BODY = {"model": "tiny", "prompt": "hi", "stream": True}


def _head(path: str) -> bytes:
    return _NDJSON if path.startswith("/api/") else _SSE


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("path", _TOKENS)
@pytest.mark.parametrize("cut", ["one piece", "token by token", "end with the last token"])
async def test_a_stream_without_its_end_mark_ends_with_an_error_of_its_protocol(path: str, cut: str) -> None:
    chunks = [_chunk(_TOKENS[path])] * 3
    pieces = [_head(path), *chunks, b"0\r\n\r\n"]
    if cut == "one piece":
        pieces = [b"".join(pieces)]
    elif cut == "end with the last token":
        pieces = [*pieces[:-2], b"".join(pieces[-2:])]
    async with staged() as stage, connect(stage.address) as connection:
        stage.upstream.script = by_turn(replying(*pieces), replying(OK))
        reply = await connection.call("POST", path, _BODY)
        assert (reply.status, reply.end) == (200, "complete")
        assert reply.body.startswith(_TOKENS[path] * 3)
        values = reply.lines() if path.startswith("/api/") else reply.events()
        assert [("error" in value) for value in values] == [False, False, False, True]
        assert b"[DONE]" not in reply.body
        assert stage.request_log.entries[0][0].error_code == "stream_truncated"
        # Its framing is complete, so the connection serves the next request.
        assert (await connection.call("POST", "/api/generate", _BODY)).body == b'{"done":true}'
        await rests(stage)


@pytest.mark.parametrize("path", _TOKENS)
@pytest.mark.parametrize("framing", ["chunked", "until close"])
async def test_a_stream_with_its_end_mark_is_not_touched(path: str, framing: str) -> None:
    data = [*[_TOKENS[path]] * 3, _MARKS[path]]
    async with staged() as stage:
        if framing == "chunked":
            stage.upstream.script = replying(_head(path), *map(_chunk, data), b"0\r\n\r\n")
        else:
            stage.upstream.script = then_closing(_head(path).replace(b"Transfer-Encoding: chunked\r\n", b""), *data)
        reply = await call(stage.address, "POST", path, _BODY)
        assert reply.body == b"".join(data)
        assert stage.request_log.entries[0][0].error_code == ""


async def test_the_end_mark_of_a_very_long_last_line_is_found_wherever_it_is_cut() -> None:
    last = b'{"model":"tiny","done":true,"context":[' + b"1234," * 3000 + b'1],"total_duration":9,"eval_count":4}\n'
    raw = _NDJSON + _chunk(_TOKENS["/api/generate"]) + _chunk(last) + b"0\r\n\r\n"
    async with staged() as stage:
        for step in (len(raw), 4096, 1000, 7):
            cuts = [*range(0, len(raw), step), len(raw)]
            stage.upstream.script = replying(*(raw[a:b] for a, b in pairwise(cuts)))
            reply = await call(stage.address, "POST", "/api/generate", _BODY)
            assert reply.body.endswith(last)
        assert [record.error_code for record, _ in stage.request_log.entries] == [""] * 4


@pytest.mark.parametrize("path", ["/api/generate", "/v1/chat/completions"])
async def test_a_stream_for_http_1_0_or_until_close_gets_the_error_too(path: str) -> None:
    async with staged() as stage:
        stage.upstream.script = replying(_head(path), _chunk(_TOKENS[path]), b"0\r\n\r\n")
        raw = request_bytes("POST", path, _BODY).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        assert b'"error":' in (await exchange(stage.address, raw)).body
        stage.upstream.script = then_closing(_head(path).replace(b"Transfer-Encoding: chunked\r\n", b""), _TOKENS[path])
        assert b'"error":' in (await call(stage.address, "POST", path, _BODY)).body
        assert [record.error_code for record, _ in stage.request_log.entries] == ["stream_truncated"] * 2


async def test_where_the_last_chunk_has_begun_the_connection_is_cut() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(_NDJSON, _chunk(_TOKENS["/api/chat"]), b"0\r\n", b"\r\n")
        reply = await call(stage.address, "POST", "/api/chat", _BODY)
        assert reply.end in ("eof", "reset")
        await rests(stage)


async def test_a_stream_that_ends_with_the_servers_error_is_passed_on_and_recorded() -> None:
    error = b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'
    async with staged() as stage:
        stage.upstream.script = replying(_NDJSON, _chunk(_TOKENS["/api/chat"]), _chunk(error), b"0\r\n\r\n")
        reply = await call(stage.address, "POST", "/api/chat", _BODY)
        assert reply.body == _TOKENS["/api/chat"] + error
        assert [record.error_code for record, _ in stage.request_log.entries] == ["instance_lost"]


async def test_a_stream_that_its_client_leaves_is_no_truncated_one() -> None:
    async with staged() as stage:
        stage.upstream.script = then_waiting(_NDJSON, _chunk(_TOKENS["/api/chat"]))
        async with connect(stage.address) as connection:
            await connection.send(request_bytes("POST", "/api/chat", _BODY))
            assert (await connection.head()).status == 200
        await eventually(lambda: stage.request_log.statuses == [499], what="the hang-up")
        assert stage.request_log.entries[0][0].error_code == ""
        await rests(stage)


_UNMARKED = [
    recording
    for recording in recordings()
    if recording.name.startswith(("0.24.0/runner-killed-v1-c", "0.24.0/runner-killed-v1-r", "0.24.0/repeat-limit-"))
    and recording.reply.status == 200
    and "json;" not in (recording.reply.header("Content-Type") or "")
]
"""Without `/v1/messages`, which the scripted server does not have."""


@pytest.mark.parametrize("recording", [one for one in _UNMARKED if one.reply.chunked], ids=lambda r: r.name)
async def test_recorded_streams_without_an_end_mark_end_with_an_error(recording: Recording) -> None:
    path = recording.request.split(b" ")[1].decode()
    async with staged() as stage:
        stage.upstream.script = replying(_head(path), *map(_chunk, recording.reply.chunks), b"0\r\n\r\n")
        reply = await call(stage.address, "POST", path, _BODY)
        assert reply.body.startswith(recording.reply.body)
        assert b'"error":' in reply.body.removeprefix(recording.reply.body)
