"""Model management: pull, create, copy, delete, push and blobs, through one instance, one write at a time.

All spawned instances share one store, so what one of them writes the others see at once. Two servers that write at the
same time do not know of each other's unfinished files, therefore writes queue here. After each the catalog forgets
what it knew of the model. A delete unloads the model everywhere first.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from router.core.events import UnloadAsked
from router.errors import InstanceLost, WaitTimeout
from router.gateway.context import GatewayContext
from router.gateway.passed import pass_on
from router.gateway.peek import peek
from router.gateway.requests import RequestInfo, read_body

_ASK_SECONDS = 10.0


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
                return await pass_on(self._context, request, body, info)
            finally:
                self._context.catalog.forget_all()

    async def _blob(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        """Uploads stream through unread: weights are far larger than any limit on a request that is kept."""
        if request.method == hdrs.METH_HEAD:
            return await pass_on(self._context, request, b"", info)
        if await self._has_blob(request):
            # As a server does: answered at once and unread, which spares the client the upload.
            present = web.Response(headers=info.reply_headers(None))
            present.force_close()
            return present
        async with self._writing:
            return await pass_on(self._context, request, request.content.iter_any(), info)

    async def _has_blob(self, request: web.BaseRequest) -> bool:
        url = URL(self._context.primary().spec.url + request.raw_path, encoded=True)
        try:
            async with asyncio.timeout(_ASK_SECONDS), self._context.session.head(url) as reply:
                return reply.status == web.HTTPOk.status_code
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise InstanceLost(f"the instance could not be asked for the blob: {error}") from error

    async def _unload(self, model: str) -> None:
        """Returns when no instance holds the model any more; running requests of it may end first.

        Raises:
            WaitTimeout: some instance still holds it; then nothing is deleted.
        """
        facts = await self._context.catalog.facts(model)
        if facts is None:
            return
        engine, blob, seconds = self._context.engine, facts.blob, self._context.limits.queue_timeout_seconds
        engine.post(UnloadAsked(blob))
        if not await engine.until(lambda snapshot: all(key[1] != blob for key in snapshot.residencies), seconds):
            raise WaitTimeout(f"model '{model}' is still in use after {seconds:.0f} s and was not deleted")
