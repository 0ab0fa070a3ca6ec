"""Model management: pull, create, copy, delete, push and blobs, through one instance, one write at a time.

All spawned instances share one store, so what one of them writes the others see at once. Two servers that write at the
same time do not know of each other's unfinished files, therefore writes queue here. After each the catalog forgets
what it knew of the model. A delete unloads the model everywhere first.
"""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from router.core.events import UnloadAsked
from router.gateway.context import GatewayContext
from router.gateway.forward import Exchange, open_upstream, relay
from router.gateway.peek import peek
from router.gateway.requests import RequestInfo, read_body
from router.gateway.shapes import api_of


class ManagedHandler:
    """Answers every route that changes the store."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._writing = asyncio.Lock()

    async def __call__(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        if request.path.startswith("/api/blobs/"):
            return await self._blob(request, info)
        body = await read_body(request, self._context.limits.max_body_bytes)
        seen = peek(body, request.path)
        info.model = seen.model or ""
        async with self._writing:
            if request.path == "/api/delete" and seen.model:
                await self._unload(seen.model)
            try:
                return await self._pass(request, body, info)
            finally:
                self._context.catalog.forget_all()

    async def _blob(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        """Uploads stream through unread: weights are far larger than any limit on a request that is kept."""
        if request.method == hdrs.METH_HEAD:
            return await self._pass(request, b"", info)
        async with self._writing:
            return await self._pass(request, request.content.iter_any(), info)

    async def _unload(self, model: str) -> None:
        facts = await self._context.catalog.facts(model)
        if facts is not None:
            self._context.engine.post(UnloadAsked(facts.blob))

    async def _pass(self, request: web.BaseRequest, body: object, info: RequestInfo) -> web.StreamResponse:
        url = self._context.primary().spec.url
        upstream = await open_upstream(self._context.session, request, url, body, self._context.limits)  # type: ignore[arg-type]
        async with upstream:
            exchange = Exchange(started=self._context.engine.now, extra_headers=info.reply_headers(None))
            info.exchange = exchange
            return await relay(request, upstream, self._context.limits, api_of(request.path), exchange)
