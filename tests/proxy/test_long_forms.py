"""A multipart form is understood in the same way whatever its length and however its pieces come."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from router.llm_api.inference_request import ModelRules
from router.llm_api.model_aliases import substitutes
from router.proxy.request_body import LONG_BODY_BYTES
from tests.proxy.stage import LIMITS, MODEL, rests, staged
from tests.support.rawhttp import Reply, call, connect

_HEADERS = (("Content-Type", "multipart/form-data; boundary=b"),)
_RULES = ModelRules(8192, substitutes=substitutes({"whisper-1": "tiny"}, {}))
_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
_SIZES = (1000, LONG_BODY_BYTES, 900_000)


def _form(model: str, file_bytes: int, *more: str) -> bytes:
    """The file first, as the OpenAI SDK writes it; `more`: models in further fields."""
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n' % (b"\0{" * file_bytes)
    field = '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{}\r\n'
    return file[: file_bytes + 80] + b"\r\n" + "".join(field.format(n) for n in (model, *more)).encode() + b"--b--\r\n"


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("path", _PATHS)
async def test_a_form_gets_a_slot_and_its_alias_is_resolved(path: str, size: int) -> None:
    async with staged(rules=_RULES) as stage:
        reply = await call(stage.address, "POST", path, _form("whisper-1", size), _HEADERS)
        assert (reply.status, reply.header("X-Llamayard-Model")) == (200, "tiny")
        (ticket,) = stage.controller.tickets
        assert ticket.model.name == MODEL.name
        (turn,) = stage.upstream.turns
        assert turn.body == _form("tiny", size)
        assert b"Content-Length: %d\r\n" % len(turn.body) in turn.head
        await rests(stage)


@pytest.mark.parametrize("size", _SIZES)
async def test_a_form_that_names_two_models_is_refused(size: int) -> None:
    async with staged() as stage:
        reply = await call(stage.address, "POST", _PATHS[0], _form("tiny", size, "other"), _HEADERS)
        assert (reply.status, reply.json()["error"]["code"]) == (400, "bad_request")
        assert stage.upstream.turns == []
        await rests(stage)


@pytest.mark.parametrize("size", _SIZES)
async def test_a_form_whose_pieces_come_slowly_is_forwarded_unchanged(size: int) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        body = _form("tiny", size)
        head = "".join(f"{name}: {value}\r\n" for name, value in _HEADERS)
        raw = (
            f"POST {_PATHS[0]} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
        step = len(raw) // 7
        for start in range(0, len(raw), step):
            await connection.write(raw[start : start + step])
            for _ in range(3):
                await asyncio.sleep(0)
        assert (await connection.reply()).status == 200
        assert stage.upstream.turns[-1].body == body
        assert len(stage.controller.tickets) == 1
        await rests(stage)


async def test_a_form_beyond_the_limit_is_refused_as_any_body_is() -> None:
    async with staged(limits=replace(LIMITS, max_body_bytes=LONG_BODY_BYTES)) as stage:
        reply: Reply = await call(stage.address, "POST", _PATHS[0], _form("tiny", LONG_BODY_BYTES), _HEADERS)
        assert reply.status == 413
        await rests(stage)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/images/edits"])
@pytest.mark.parametrize("size", _SIZES)
async def test_json_is_read_as_json_whatever_its_header_says(path: str, size: int) -> None:
    async with staged(rules=_RULES) as stage:
        body = b'{"model":"whisper-1","prompt":"%b"}' % (b"x" * size)
        reply = await call(stage.address, "POST", path, body, _HEADERS)
        assert (reply.status, reply.header("X-Llamayard-Model")) == (200, "tiny")
        assert len(stage.controller.tickets) == 1
        await rests(stage)


@pytest.mark.parametrize("size", _SIZES)
async def test_a_form_where_a_server_reads_json_is_left_to_the_server(size: int) -> None:
    async with staged(rules=_RULES) as stage:
        await call(stage.address, "POST", "/v1/images/edits", _form("whisper-1", size), _HEADERS)
        assert stage.controller.tickets == []
        assert stage.upstream.turns[0].body == _form("whisper-1", size)
        await rests(stage)
