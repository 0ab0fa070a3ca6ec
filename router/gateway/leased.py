"""Requests that use a model: read what routing needs, take a slot, stream the answer, give the slot back.

The steps stand in `gateway/asked.py`, how a body is adapted in `gateway/wanted.py`, and how a waiting client is kept in
`gateway/waiting.py`. What the router cannot route (unreadable, no model, a model nobody has) goes to one instance as it
is, so that the client gets its own words.

A request is tried again elsewhere only while no byte of an answer has reached the client.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import aiohttp
import structlog
from aiohttp import web

from router.core.entities import ModelFacts
from router.core.events import Grant, UnloadAsked
from router.errors import InstanceLost, RouterError
from router.gateway.abilities import refuse_missing
from router.gateway.answers import json_answer
from router.gateway.asked import Asked
from router.gateway.context import GatewayContext
from router.gateway.endings import RUNNER_DIED, runner_died
from router.gateway.forward import Exchange, open_upstream, relay
from router.gateway.heart import Heart
from router.gateway.passed import pass_on
from router.gateway.requests import RequestInfo, read_body
from router.gateway.shapes import NDJSON, SSE, api_of
from router.gateway.waiting import REFUSAL_BYTES_MAX, refusal
from router.gateway.wanted import Wanted, reply_notes, unloaded

_ATTEMPTS = 3
_ERROR_BODY_SECONDS = 10.0


class LeasedHandler:
    """Answers every route that generates or embeds."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._log = structlog.get_logger("router.request")

    async def __call__(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        context, path = self._context, request.path
        body = await read_body(request, context.limits.max_body_bytes)
        primary = context.primary()
        if not await context.abilities.has(primary, path):
            refuse_missing(primary, path)
            return await pass_on(context, request, body, info)
        asked = Asked(
            context.rules, path, body, request.headers.get, request.remote or "", lambda: context.engine.snapshot().gpus
        )
        info.client = asked.asker.client
        info.notes = asked.notes
        async with Heart(request, asked.heartbeat, lambda: info.reply_headers(None)) as heart:
            try:
                return await self._answer(request, asked, info, heart)
            except RouterError as error:
                begun = await heart.stop()
                if begun is None or heart.beat is None:
                    raise
                info.error_code = error.code
                await begun.write(heart.beat.late_error(error))
                await begun.write_eof()
                return begun

    async def _answer(
        self, request: web.BaseRequest, asked: Asked, info: RequestInfo, heart: Heart
    ) -> web.StreamResponse:
        """By the model that was asked for, or by the first of those that may stand in for it."""
        while True:
            facts = await self._facts(asked)
            if facts is None:
                if asked.model and asked.instead("model_not_found"):
                    continue
                break
            try:
                return await self._by(facts, request, asked, info, heart)
            except RouterError as error:
                if asked.instead(error.code, error):
                    continue
                raise asked.error or error from error
        if asked.error is not None:
            raise asked.error
        return await self._as_it_is(request, asked, info, heart)

    async def _facts(self, asked: Asked) -> ModelFacts | None:
        return await self._context.catalog.facts(asked.model) if asked.model else None

    async def _by(
        self, facts: ModelFacts, request: web.BaseRequest, asked: Asked, info: RequestInfo, heart: Heart
    ) -> web.StreamResponse:
        info.model = facts.name
        if asked.unloads():
            self._context.engine.post(UnloadAsked(facts.blob))
            await heart.stop()
            said = unloaded(request.path, asked.named, datetime.now(UTC))
            return json_answer(said, info.reply_headers(None))
        want = asked.wanted(facts)
        info.notes = {**asked.notes, **reply_notes(want)}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(request, asked, want, info, heart, last=attempt == _ATTEMPTS)
            except _Retry as retry:
                self._log.warning("tried again", request_id=info.request_id, model=info.model, why=str(retry))
        raise InstanceLost("no instance could answer")

    async def _attempt(
        self, request: web.BaseRequest, asked: Asked, want: Wanted, info: RequestInfo, heart: Heart, *, last: bool
    ) -> web.StreamResponse:
        engine, limits = self._context.engine, self._context.limits
        ticket = want.ticket(engine.new_ticket_id(), asked.asker, engine.now(), limits.queue_timeout_seconds)
        lease = engine.lease(ticket)
        async with lease as grant:
            info.granted(grant, engine.now())
            try:
                upstream = await open_upstream(self._context.session, request, grant.url, want.body_for(grant), limits)
            except InstanceLost as error:
                lease.report_runner_lost()
                if last:
                    raise
                raise _Retry(str(error)) from error
            try:
                died = await _death(upstream)
                if died is not None:
                    lease.report_runner_lost()
                    if not last:
                        raise _Retry(died.decode(errors="replace"))
                response = await self._stream(request, upstream, grant, info, heart)
                if _ended_by_death(request, response, info):
                    lease.report_runner_lost()
            except BaseException:
                upstream.close()
                raise
            upstream.release()
            return response

    async def _stream(
        self,
        request: web.BaseRequest,
        upstream: aiohttp.ClientResponse,
        grant: Grant | None,
        info: RequestInfo,
        heart: Heart,
    ) -> web.StreamResponse:
        begun = await heart.stop()
        exchange = Exchange(started=self._context.engine.now, extra_headers=info.reply_headers(grant))
        info.exchange = exchange
        if begun is not None and upstream.status != web.HTTPOk.status_code:
            raise refusal(upstream.status, await _error_body(upstream))
        return await relay(request, upstream, self._context.limits, api_of(request.path), exchange, begun)

    async def _as_it_is(
        self, request: web.BaseRequest, asked: Asked, info: RequestInfo, heart: Heart
    ) -> web.StreamResponse:
        """To one instance, without a slot: it answers with an error of its own."""
        url, limits = self._context.primary().spec.url, self._context.limits
        info.notes = {}
        upstream = await open_upstream(self._context.session, request, url, asked.original, limits)
        async with upstream:
            return await self._stream(request, upstream, None, info, heart)


class _Retry(Exception):
    """Nothing has reached the client: the request may be tried once more."""


async def _error_body(upstream: aiohttp.ClientResponse) -> bytes:
    try:
        async with asyncio.timeout(_ERROR_BODY_SECONDS):
            return await upstream.content.read(REFUSAL_BYTES_MAX)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise InstanceLost("the instance died while it answered") from error


async def _death(upstream: aiohttp.ClientResponse) -> bytes | None:
    """The words of a reply that says that the model's runner died before its first token, else None.

    What was read is put back, so that the reply can still be relayed.
    """
    if upstream.status != web.HTTPInternalServerError.status_code:
        return None
    words = await _error_body(upstream)
    if words:
        upstream.content.unread_data(words)
    return words if any(marker in words for marker in RUNNER_DIED) else None


def _ended_by_death(request: web.BaseRequest, response: web.StreamResponse, info: RequestInfo) -> bool:
    if info.exchange is None:
        return False
    is_stream = response.headers.get("Content-Type", "").startswith((NDJSON, SSE))
    return runner_died(response.status, is_stream, request.path, info.exchange.tail)
