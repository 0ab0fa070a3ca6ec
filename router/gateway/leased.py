"""Requests that use a model: read what routing needs, take a slot, stream the answer, give the slot back.

What a request wants, and how its body is adapted, stands in `gateway/wanted.py`. What the router cannot route
(unreadable, no model, a model nobody has) goes to one instance as it is, so that the client gets its own words.

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
from router.errors import InstanceLost
from router.gateway.answers import json_answer
from router.gateway.context import GatewayContext
from router.gateway.endings import RUNNER_DIED, runner_died
from router.gateway.forward import Exchange, open_upstream, relay
from router.gateway.passed import pass_on
from router.gateway.peek import Peek, peek
from router.gateway.requests import RequestInfo, read_body
from router.gateway.shapes import NDJSON, SSE, api_of
from router.gateway.wanted import Asker, Wanted, keep_alive_of, reply_notes, unloaded, wanted

_ATTEMPTS = 3
_ERROR_BODY_BYTES = 65536
_ERROR_BODY_SECONDS = 10.0


class LeasedHandler:
    """Answers every route that generates or embeds."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._log = structlog.get_logger("router.request")

    async def __call__(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        body = await read_body(request, self._context.limits.max_body_bytes)
        seen = peek(body, request.path)
        facts = await self._facts(seen)
        if facts is None:
            return await self._as_it_is(request, body, info)
        info.model = facts.name
        if seen.is_load_only and keep_alive_of(seen) == 0:
            self._context.engine.post(UnloadAsked(facts.blob))
            return json_answer(unloaded(request.path, seen.model or "", datetime.now(UTC)), info.reply_headers(None))
        want = wanted(request.path, seen, facts, body, self._context.default_context_length)
        info.notes = reply_notes(want)
        return await self._leased(request, want, info)

    async def _facts(self, seen: Peek) -> ModelFacts | None:
        if seen.unreadable or not seen.model:
            return None
        return await self._context.catalog.facts(seen.model)

    async def _leased(self, request: web.BaseRequest, want: Wanted, info: RequestInfo) -> web.StreamResponse:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(request, want, info, last=attempt == _ATTEMPTS)
            except _Retry as retry:
                self._log.warning("tried again", request_id=info.request_id, model=info.model, why=str(retry))
        raise InstanceLost("no instance could answer")

    async def _attempt(
        self, request: web.BaseRequest, want: Wanted, info: RequestInfo, *, last: bool
    ) -> web.StreamResponse:
        engine = self._context.engine
        asker = Asker(client=info.client)
        ticket = want.ticket(engine.new_ticket_id(), asker, engine.now(), self._context.limits.queue_timeout_seconds)
        lease = engine.lease(ticket)
        async with lease as grant:
            info.granted(grant, self._context.engine.now())
            try:
                upstream = await open_upstream(
                    self._context.session, request, grant.url, want.body_for(grant), self._context.limits
                )
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
                response = await self._stream(request, upstream, grant, info)
                if _ended_by_death(request, response, info):
                    lease.report_runner_lost()
            except BaseException:
                upstream.close()
                raise
            upstream.release()
            return response

    async def _stream(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse, grant: Grant, info: RequestInfo
    ) -> web.StreamResponse:
        exchange = Exchange(started=self._context.engine.now, extra_headers=info.reply_headers(grant))
        info.exchange = exchange
        return await relay(request, upstream, self._context.limits, api_of(request.path), exchange)

    async def _as_it_is(self, request: web.BaseRequest, body: bytes, info: RequestInfo) -> web.StreamResponse:
        """To one instance, without a slot: it answers with an error of its own."""
        return await pass_on(self._context, request, body, info)


class _Retry(Exception):
    """Nothing has reached the client: the request may be tried once more."""


async def _death(upstream: aiohttp.ClientResponse) -> bytes | None:
    """The words of a reply that says that the model's runner died before its first token, else None.

    What was read is put back, so that the reply can still be relayed.
    """
    if upstream.status != web.HTTPInternalServerError.status_code:
        return None
    async with asyncio.timeout(_ERROR_BODY_SECONDS):
        words = await upstream.content.read(_ERROR_BODY_BYTES)
    if words:
        upstream.content.unread_data(words)
    return words if any(marker in words for marker in RUNNER_DIED) else None


def _ended_by_death(request: web.BaseRequest, response: web.StreamResponse, info: RequestInfo) -> bool:
    if info.exchange is None:
        return False
    is_stream = response.headers.get("Content-Type", "").startswith((NDJSON, SSE))
    return runner_died(response.status, is_stream, request.path, info.exchange.tail)
