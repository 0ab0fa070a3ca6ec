"""A prompt that outgrows its context: the ticket asks for more, and the reply says when there was no more."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from router.domain.actions import Grant
from router.domain.instance import InstanceName
from router.domain.request import RunnerOptions, TicketId
from tests.proxy.stage import MODEL, Stage, rests, staged
from tests.support.rawhttp import Reply, connect, request_bytes
from tests.support.waiting import eventually

_LONG = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 100_000}], "stream": False}
_UPLOAD = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 300_000}], "stream": False}
_PATHS = ["/api/chat", "/v1/chat/completions"]


def _prepare(stage: Stage) -> None:
    stage.catalog.models["tiny"] = replace(MODEL, context_length=131_072)
    stage.controller.urls = []


def _grant(stage: Stage, options: RunnerOptions, context_length: int) -> None:
    (ticket,) = stage.controller.waiting
    decided = stage.controller.waiting.pop(ticket)
    stage.controller.held.add(ticket)
    decided(Grant(ticket, InstanceName("gpu0"), stage.upstream.url, "because", 0, 1, None, options, context_length))


async def _served(
    stage: Stage, path: str, body: dict[str, Any], rejections: list[str], options: RunnerOptions, context_length: int
) -> Reply:
    """The reply after so many rejections."""
    async with connect(stage.address) as connection:
        await connection.send(request_bytes("POST", path, body))
        for number, code in enumerate(rejections, 1):
            await eventually(lambda number=number: len(stage.controller.tickets) == number, what="a ticket")
            stage.controller.reject(TicketId(number), code)
        await eventually(lambda: len(stage.controller.tickets) == len(rejections) + 1, what="a ticket")
        _grant(stage, options, context_length)
        return await connection.reply()


@pytest.mark.parametrize("path", _PATHS)
async def test_a_raised_context_is_named_to_servers_that_read_it(path: str) -> None:
    async with staged() as stage:
        _prepare(stage)
        reply = await _served(stage, path, _LONG, [], (("num_ctx", 32_768),), 32_768)
        assert (reply.status, reply.header("X-Llamayard-Context")) == (200, None)
        assert stage.controller.tickets[0].context_length == 32_768
        named = {"options": {"num_ctx": 32_768}} if path == "/api/chat" else {}
        assert json.loads(stage.upstream.turns[0].body) == {**_LONG, **named}
        await rests(stage)


@pytest.mark.parametrize("path", _PATHS)
async def test_a_context_that_fits_nowhere_is_given_up_and_reported(path: str) -> None:
    async with staged() as stage:
        _prepare(stage)
        reply = await _served(stage, path, _LONG, ["model_too_large"], (), 8192)
        assert (reply.status, reply.header("X-Llamayard-Context")) == (200, "8192")
        assert [ticket.context_length for ticket in stage.controller.tickets] == [32_768, 0]
        assert json.loads(stage.upstream.turns[0].body) == _LONG
        await rests(stage)


@pytest.mark.parametrize("path", _PATHS)
async def test_a_long_body_with_a_long_prompt_waits_for_its_context(path: str) -> None:
    """It cannot start early: how long the prompt is shows at its end."""
    async with staged() as stage:
        _prepare(stage)
        stage.controller.urls = [stage.upstream.url]
        async with connect(stage.address) as connection:
            await connection.send(request_bytes("POST", path, _UPLOAD))
            assert (await connection.reply()).status == 200
        assert stage.controller.tickets[-1].context_length == 131_072
        assert len(stage.upstream.turns) == 1
        await rests(stage)


async def test_a_short_prompt_after_a_long_one_asks_for_nothing() -> None:
    async with staged() as stage:
        _prepare(stage)
        stage.controller.urls = [stage.upstream.url]
        async with connect(stage.address) as connection:
            for content, context in (("x", 0), ("x" * 100_000, 32_768), ("x", 0)):
                body = {**_LONG, "messages": [{"role": "user", "content": content}]}
                assert (await connection.call("POST", "/api/chat", body)).status == 200
                assert stage.controller.tickets[-1].context_length == context
        await rests(stage)
