"""Bodies with `Content-Encoding: zstd`, as Codex sends them: read, routed, and forwarded decompressed."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest
import zstandard

from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import substitutes
from tests.proxy.stage import LIMITS, Stage, by_turn, closing, replying, rests, staged
from tests.proxy.stage import OK as _OK
from tests.support.rawhttp import Reply, call, connect

_ZSTD = (("Content-Encoding", "zstd"),)
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
_RESPONSES = {"model": "tiny", "input": "hi"}


def _packed(body: object) -> bytes:
    return zstandard.ZstdCompressor().compress(json.dumps(body).encode())


async def _post(stage: Stage, path: str, body: bytes) -> Reply:
    return await call(stage.address, "POST", path, body, _ZSTD)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", _CHAT), ("/v1/responses", _RESPONSES)])
async def test_a_compressed_body_is_routed_and_forwarded_plain(path: str, body: object) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        for _ in range(3):  # the second time its head is cached
            assert (await connection.call("POST", path, _packed(body), _ZSTD)).status == 200
        for turn in stage.upstream.turns:
            assert json.loads(turn.body) == body
            assert b"content-encoding" not in turn.head.lower()
        assert [ticket.model.name for ticket in stage.controller.tickets] == ["tiny:latest"] * 3
        await rests(stage)


async def test_a_long_compressed_body_is_read_whole() -> None:
    body = {**_CHAT, "padding": Random(1).randbytes(400_000).hex()}
    packed = _packed(body)
    assert len(packed) > 262_144
    limits = replace(LIMITS, max_body_bytes=2**25)
    async with staged(limits=limits) as stage:
        assert (await _post(stage, "/v1/chat/completions", packed)).status == 200
        assert json.loads(stage.upstream.turns[0].body) == body


async def test_an_alias_is_put_into_the_plain_body_and_a_retry_sends_it_again() -> None:
    rules = ModelRules(8192, substitutes({"gpt": "tiny"}, {}))
    async with staged(rules=rules) as stage:
        stage.upstream.script = by_turn(closing, replying(_OK))
        reply = await _post(stage, "/v1/chat/completions", _packed({**_CHAT, "model": "gpt"}))
        assert (reply.status, reply.header("X-Llamayard-Model")) == (200, "tiny")
        assert [json.loads(turn.body) for turn in stage.upstream.turns] == [_CHAT, _CHAT]


async def test_an_unknown_model_gets_the_servers_answer() -> None:
    async with staged() as stage:
        stage.upstream.script = replying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
        assert (await _post(stage, "/v1/chat/completions", _packed({**_CHAT, "model": "nope"}))).status == 404
        assert json.loads(stage.upstream.turns[0].body)["model"] == "nope"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", json.dumps(_CHAT).encode(), 400, "bad_request"),
        ("/v1/responses", _packed(_RESPONSES)[:-3], 400, "bad_request"),
        ("/v1/chat/completions", zstandard.ZstdCompressor().compress(bytes(64 << 20)), 413, "body_too_large"),
    ],
    ids=["plain", "cut", "bomb"],
)
async def test_a_body_that_cannot_be_decompressed_is_refused_in_the_apis_shape(
    path: str, body: bytes, status: int, code: str
) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        reply = await connection.call("POST", path, body, _ZSTD)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (status, code)
        assert reply.json()["error"]["code"] == code
        assert (await connection.call("POST", path, _packed(_CHAT), _ZSTD)).status == 200
        assert stage.request_log.statuses == [status, 200]
        await rests(stage)


async def test_the_header_without_a_body_or_on_other_routes_changes_nothing() -> None:
    async with staged() as stage:
        assert (await call(stage.address, "GET", "/v1/models", headers=_ZSTD)).status == 200
        assert (await call(stage.address, "GET", "/v1/models/tiny", headers=_ZSTD)).status == 200
        body = json.dumps(_CHAT).encode()
        for path, header in (("/api/chat", "zstd"), ("/v1/chat/completions", "gzip")):
            await call(stage.address, "POST", path, body, (("Content-Encoding", header),))
            assert stage.upstream.turns[-1].body == body
            assert b"content-encoding: " + header.encode() in stage.upstream.turns[-1].head.lower()
