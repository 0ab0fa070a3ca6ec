"""A body that names different models in one field is refused: a reader in front of the router may take another one."""

from __future__ import annotations

import json

import pytest

from tests.proxy.stage import rests, staged
from tests.support.rawhttp import call

_PADDING = b',"messages":[{"role":"user","content":"' + b"x" * 300_000 + b'"}]}'
_FORM = "multipart/form-data; boundary=b"


def _form(*models: str) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n' for model in models]
    return "".join((*parts, "--b--\r\n")).encode()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    "members",
    [
        b'"model":"tiny","model":"other"',
        b'"model":"other","Model":"tiny"',
        b'"model":"tiny","\\u006dodel":"other"',
        b'"model":"tiny","MODEL":null,"model":"other","model":"tiny"',
        b'"model":"tiny","model":""',
    ],
)
@pytest.mark.parametrize("end", [b',"messages":[]}', _PADDING], ids=["short", "long"])
async def test_different_models_in_one_field_are_refused(path: str, members: bytes, end: bytes) -> None:
    async with staged() as stage:
        reply = await call(stage.address, "POST", path, b"{" + members + end)
        assert (reply.status, reply.header("X-Llamayard-Error")) == (400, "bad_request")
        error = reply.json()["error"]
        assert "'model'" in (error if path == "/api/chat" else error["message"])
        assert [turn for turn in stage.upstream.turns if json.loads(turn.body)] == []
        assert stage.request_log.statuses == [400]
        await rests(stage)


@pytest.mark.parametrize(
    "members",
    [b'"model":"tiny","model":"tiny"', b'"Model":"tiny","model":null', b'"model":"tiny","options":{"model":"x"}'],
)
async def test_the_same_model_twice_is_served(members: bytes) -> None:
    async with staged() as stage:
        assert (await call(stage.address, "POST", "/api/chat", b"{" + members + b',"messages":[]}')).status == 200


async def test_a_form_with_different_models_is_refused() -> None:
    async with staged() as stage:
        headers = (("Content-Type", _FORM),)
        path = "/v1/audio/transcriptions"
        assert (await call(stage.address, "POST", path, _form("tiny", "tiny"), headers)).status == 200
        reply = await call(stage.address, "POST", path, _form("tiny", "other"), headers)
        assert (reply.status, reply.json()["error"]["code"]) == (400, "bad_request")
