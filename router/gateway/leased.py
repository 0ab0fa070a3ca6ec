"""Requests that use a model: read what routing needs, take a slot, stream the answer, give the slot back.

The body forwarded is the client's, byte for byte, but for the few members that are the router's business: `keep_alive`
(the router's own timers honour it) and the placement options `num_gpu` and `main_gpu`. What the router cannot route
(unreadable, no model, a model nobody has) goes to one instance as it is, so that the client gets its own words.

A request is tried again elsewhere only while no byte of an answer has reached the client.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import structlog
from aiohttp import web

from router.core.entities import ModelFacts, RunnerOptions, Ticket
from router.core.events import Grant, UnloadAsked
from router.core.keepalive import parse_keep_alive
from router.core.options import PLACEMENT_OPTIONS, runner_options
from router.errors import BadRequest, InstanceLost
from router.gateway.answers import json_answer
from router.gateway.context import GatewayContext
from router.gateway.endings import RUNNER_DIED, runner_died
from router.gateway.forward import Exchange, open_upstream, relay
from router.gateway.passed import pass_on
from router.gateway.peek import Peek, peek
from router.gateway.requests import RequestInfo, read_body
from router.gateway.shapes import NDJSON, SSE, api_of
from router.gateway.splice import remove_nested, set_member

_ATTEMPTS = 3
_ERROR_BODY_BYTES = 65536
_ERROR_BODY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request as far as routing is concerned."""

    facts: ModelFacts
    options: RunnerOptions
    keep_alive_seconds: float | None
    body: bytes


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
        keep_alive = _keep_alive(seen)
        if seen.is_load_only and keep_alive == 0:
            self._context.engine.post(UnloadAsked(facts.blob))
            return json_answer(_unloaded(request.path, seen.model or ""), info.reply_headers(None))
        wanted = self._wanted(seen, facts, keep_alive, body)
        return await self._leased(request, wanted, info)

    async def _facts(self, seen: Peek) -> ModelFacts | None:
        if seen.unreadable or not seen.model:
            return None
        return await self._context.catalog.facts(seen.model)

    def _wanted(self, seen: Peek, facts: ModelFacts, keep_alive: float | None, body: bytes) -> _Wanted:
        options = runner_options(facts, seen.options, self._context.default_context_length)
        for name in PLACEMENT_OPTIONS:
            if name in seen.options:
                body = remove_nested(body, "options", name)
        if keep_alive is not None:
            # The server must never unload by itself what the router counts on: its timers are the router's.
            body = set_member(body, "keep_alive", b"-1")
        return _Wanted(facts, options, keep_alive, body)

    async def _leased(self, request: web.BaseRequest, wanted: _Wanted, info: RequestInfo) -> web.StreamResponse:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(request, wanted, info, last=attempt == _ATTEMPTS)
            except _Retry as retry:
                self._log.warning("tried again", request_id=info.request_id, model=info.model, why=str(retry))
        raise InstanceLost("no instance could answer")

    async def _attempt(
        self, request: web.BaseRequest, wanted: _Wanted, info: RequestInfo, *, last: bool
    ) -> web.StreamResponse:
        lease = self._context.engine.lease(self._ticket(wanted, info))
        async with lease as grant:
            info.granted(grant, self._context.engine.now())
            try:
                upstream = await open_upstream(
                    self._context.session, request, grant.url, wanted.body, self._context.limits
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

    def _ticket(self, wanted: _Wanted, info: RequestInfo) -> Ticket:
        engine = self._context.engine
        now = engine.now()
        return Ticket(
            id=engine.new_ticket_id(),
            model=wanted.facts,
            options=wanted.options,
            context_length=0,
            keep_alive_seconds=wanted.keep_alive_seconds,
            arrived_at=now,
            deadline=now + self._context.limits.queue_timeout_seconds,
            client=info.client,
        )

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


def _unloaded(path: str, model: str) -> dict[str, object]:
    """What a server says at once to a request that unloads, whether the model is loaded, busy or neither.

    Said here, because a server that was asked would unload by itself, behind the books.
    """
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    said = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
    return {"model": model, "created_at": now, **said, "done": True, "done_reason": "unload"}


def _keep_alive(seen: Peek) -> float | None:
    """Seconds, negative for ever, None where the request says nothing or what the server will refuse."""
    try:
        return parse_keep_alive(seen.keep_alive)
    except ValueError as error:
        raise BadRequest(str(error)) from error
