"""Model management: pull, create, copy, delete, push and blobs, through one instance, one write at a time.

All spawned instances share one store, so what one of them writes the others see at once. Two servers that write at the
same time do not know of each other's unfinished files, therefore one writes, and changes queue here but for uploads of
what is not there yet; pulls of one model are one pull (`api/shared_pulls.py`). After each the catalog forgets what it
knew, and weights that a name no longer means leave the GPUs and the store: the servers are told to prune nothing,
because they would prune each other's downloads.

A delete first lets running requests end, lets none begin, and unloads. What only an attached server has is not managed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import aiohttp
import structlog
from aiohttp import hdrs, web
from yarl import URL

from router.api.context import ApiContext, store_turn
from router.api.passthrough import pass_on
from router.api.shared_pulls import Pulls
from router.domain.events import UnloadRequested
from router.domain.model import ModelFacts
from router.engines.ollama.client import OllamaClient, OllamaError
from router.engines.ollama.driver import temporary_tag_for
from router.errors import Forbidden, InstanceLost, NoInstance, ShuttingDown, WaitTimeout
from router.llm_api.body_reader import last_value, parse_body
from router.llm_api.inference_request import refuse_cloud
from router.llm_api.json_members import text_of
from router.observability.request_record import RequestRecord, read_body

_ASK_SECONDS = 10.0
_STORE_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
_WORTH_READING_BYTES = 262144
"""What is left unread of a request is read to its end up to that, as Go does; after more the connection is closed."""


class ModelManagementHandler:
    """Answers every route that changes the store."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._pulls = Pulls(context)
        self._clearing: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("router.store")

    async def __call__(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        if request.path.startswith("/api/blobs/"):
            return await self._blob(request, info)
        context, path = self._context, request.path
        body = await read_body(request, context.limits.max_body_bytes)
        seen = parse_body(body, path)
        info.model = seen.model or ""
        if path != "/api/delete":  # what stands for a cloud model here may go
            refuse_cloud(info.model, cloud=context.rules.cloud)
        if path == "/api/push":
            return await pass_on(context, request, body, info)  # it reads the store
        changed = _destination(body) if path == "/api/copy" and info.model else info.model
        before = await context.catalog.facts(changed) if changed else None
        if path == "/api/delete":
            return await self._delete(request, body, before, info)
        try:
            if path == "/api/pull" and info.model:
                return await self._pulls.serve(request, body, seen, info)
            async with store_turn(context.writing, context.limits):
                return await pass_on(context, request, body, info)
        finally:
            context.catalog.forget_all()
            if before is not None and before.is_shared:
                self._start(self._clear_away(before, changed))

    async def close(self) -> None:
        """Ends what goes on behind the answers."""
        for task in self._clearing:
            task.cancel()
        await asyncio.gather(*self._clearing, return_exceptions=True)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """Behind the answer: a client that has it may leave, and would take the work along."""
        task = asyncio.get_running_loop().create_task(work)
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    # --- blobs ---------------------------------------------------------------------------------------------

    async def _blob(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        """Uploads stream through unread: weights are far larger than any limit on a request that is kept."""
        if request.method == hdrs.METH_HEAD:
            return await pass_on(self._context, request, b"", info)
        if await self._has_blob(request):
            # As a server does: answered at once and unread, which spares the client the upload.
            present = web.Response(headers=info.reply_headers(None))
            if (request.content_length or _WORTH_READING_BYTES) >= _WORTH_READING_BYTES:
                present.force_close()
            return present
        # It takes no turn: nothing that is there changes, and a slow client would hold all others up.
        return await pass_on(self._context, request, request.content.iter_any(), info)

    async def _has_blob(self, request: web.BaseRequest) -> bool:
        url = URL(self._context.primary().spec.url + request.raw_path, encoded=True)
        try:
            async with asyncio.timeout(_ASK_SECONDS), self._context.session.head(url) as reply:
                return reply.status == web.HTTPOk.status_code
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise InstanceLost(f"the instance could not be asked for the blob: {error}") from error

    # --- deleting ------------------------------------------------------------------------------------------

    async def _delete(
        self, request: web.BaseRequest, body: bytes, facts: ModelFacts | None, info: RequestRecord
    ) -> web.StreamResponse:
        context = self._context
        if facts is None:
            return await self._deleted(request, body, info)
        primary = context.primary()
        if not facts.is_on(primary.spec):
            where = ", ".join(sorted(facts.attached_on or ()))
            raise Forbidden(f"model '{facts.name}' is only on {where}, which something else runs: delete it there")
        names = await context.catalog.names_of(facts.blob)
        if any(name != facts.name for name in names):
            return await self._deleted(request, body, info)  # the weights stay, and so may what runs on them
        context.removing.add(facts.name)
        try:
            await self._unload(facts)
            return await self._deleted(request, body, info)
        finally:
            context.removing.discard(facts.name)

    async def _deleted(self, request: web.BaseRequest, body: bytes, info: RequestRecord) -> web.StreamResponse:
        async with store_turn(self._context.writing, self._context.limits):
            try:
                return await pass_on(self._context, request, body, info)
            finally:
                self._context.catalog.forget_all()

    async def _unload(self, facts: ModelFacts) -> None:
        """Returns when no instance holds the weights any more; running requests of them may end first.

        Raises:
            WaitTimeout: some instance still holds it; then nothing is deleted.
        """
        controller, blob, seconds = self._context.controller, facts.blob, self._context.limits.queue_timeout_seconds
        until = controller.now() + seconds
        while controller.now() < until:
            # Asked again and again: a request that was let in before may ask for another keep_alive.
            controller.post(UnloadRequested(blob, even_pinned=True))
            if await controller.until(
                lambda snapshot: all(key[1] != blob for key in snapshot.residencies), _AGAIN_SECONDS
            ):
                return
        raise WaitTimeout(f"model '{facts.name}' is still in use after {seconds:.0f} s and was not deleted")

    # --- weights that no name means any more -----------------------------------------------------------------

    async def _clear_away(self, before: ModelFacts, name: str) -> None:
        """After a name was given other weights: the old ones leave the GPUs, and the store where nothing names them.

        Never fails: what the client asked for is done. What is loaded is unloaded by the driver, which removes the
        files as well; what is not loaded is removed here.
        """
        context = self._context
        try:
            today = await context.catalog.facts(name)
            if (today is not None and today.blob == before.blob) or await context.catalog.names_of(before.blob):
                return
            context.controller.post(UnloadRequested(before.blob, even_pinned=True))
            if any(key[1] == before.blob for key in context.controller.snapshot().residencies):
                return
            client = OllamaClient(context.session, context.primary().spec.url)
            async with context.writing:
                await client.create(temporary_tag_for(before.blob), before.blob, _STORE_SECONDS)
                await client.delete(temporary_tag_for(before.blob))
        except (OllamaError, NoInstance, ShuttingDown) as error:
            self._log.warning("old_weights_stay", model=before.name, blob=before.blob, why=error.message)


def _destination(body: bytes) -> str:
    """The name that a copy gives; "" where the server will refuse it."""
    value = last_value(body, "destination")
    return text_of(value) if value.startswith(b'"') else ""
