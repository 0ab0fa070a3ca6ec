"""Requests that go to one server as they are: facts of a model, lists in OpenAI's form, what only a server knows."""

from __future__ import annotations

from aiohttp import web

from router.gateway.context import GatewayContext
from router.gateway.forward import Body, Exchange, open_upstream, relay
from router.gateway.requests import RequestInfo, read_body
from router.gateway.shapes import api_of


class PassedHandler:
    """Answers by asking the primary instance."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        body = await read_body(request, self._context.limits.max_body_bytes) if request.body_exists else b""
        return await pass_on(self._context, request, body, info)


async def pass_on(
    context: GatewayContext, request: web.BaseRequest, body: Body, info: RequestInfo
) -> web.StreamResponse:
    """Sends the request to the primary instance and streams its answer back."""
    url = context.primary().spec.url
    upstream = await open_upstream(context.session, request, url, body, context.limits)
    async with upstream:
        exchange = Exchange(started=context.engine.now, extra_headers=info.reply_headers(None))
        info.exchange = exchange
        return await relay(request, upstream, context.limits, api_of(request.path), exchange)
