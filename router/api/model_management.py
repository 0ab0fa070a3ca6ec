"""Model management: pull, create, copy, delete, push and blobs, through one instance, one write at a time.

All spawned instances share one store, so each sees the others' writes at once. Two servers that write at the same time
would not know of each other's unfinished files. Therefore one instance writes, and changes queue here, except for
uploads of new blobs; concurrent pulls of one model become one pull (`api/shared_pulls.py`). After each change the
catalog is invalidated, and weights that no name refers to any more are removed from the GPUs and the store: the servers
do not prune, because they would prune each other's downloads.

A delete first waits for running requests, admits no new ones, and unloads. Models that only an attached server has are
not managed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import aiohttp
import structlog
from aiohttp import hdrs, web
from yarl import URL

from router.api.context import ApiContext, lost_by, store_turn
from router.api.forwarding import read_body
from router.api.passthrough import forward
from router.api.shared_pulls import Pulls
from router.domain.events import UnloadRequested
from router.domain.model import ModelFacts
from router.engines.ollama.client import OllamaClient, OllamaError
from router.engines.ollama.driver import temporary_tag_for
from router.errors import Forbidden, NoInstance, ShuttingDown, WaitTimeout
from router.llm_api.body_reader import last_value, parse_body
from router.llm_api.inference_request import refuse_cloud, refuse_conflict, refuse_model
from router.llm_api.json_members import Malformed, TooComplex, text_of
from router.observability.request_record import RequestRecord

_BLOB_QUERY_TIMEOUT_SECONDS = 10.0
_STORE_TIMEOUT_SECONDS = 60.0
_UNLOAD_RETRY_SECONDS = 1.0
_USES = {"/api/copy": "copy", "/api/delete": "delete", "/api/push": "push"}
"""Paths whose model must exist, and what they do with it."""
_OTHER_NAMES = {"/api/copy": "destination", "/api/create": "from"}
"""Paths whose body names a second model, and its member."""
_CHANGES = {
    "/api/copy": "copied", "/api/create": "created", "/api/delete": "deleted", "/api/pull": "pulled",
    "/api/push": "pushed",
}  # fmt: skip
_UNREAD_BYTES_MAX = 262144
"""Up to this much of an unread request body is discarded, as Go does; with more the connection is closed."""


class ModelManagementHandler:
    """Serves every route that changes the store."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self.pulls = Pulls(context)
        self._cleanups: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("router.store")

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        if request.path.startswith("/api/blobs/"):
            return await self._blob(request, record)
        context, path = self._context, request.path
        body = await read_body(request, context.limits)
        parsed = parse_body(body, path)
        refuse_conflict(parsed)
        record.model = parsed.model or ""
        refuse_model(record.key, record.model)
        context.refuse_attached(record.model, _CHANGES.get(path, "changed"))
        if path != "/api/delete":  # a cloud model's local stub may be deleted
            refuse_cloud(record.model, cloud=context.rules.cloud)
        if path in _USES:
            facts = await context.catalog.facts(record.model) if record.model else None
            record.is_unrouted = facts is None
            self._refuse_attached(facts, _USES[path])
        else:
            record.is_unrouted = not record.model
        other = _text_member(body, _OTHER_NAMES[path]) if path in _OTHER_NAMES else ""
        await self._check_rules(path, body, other, record)
        if path == "/api/push":
            return await forward(context, request, body, record)  # it only reads the store
        changed_name = other if path == "/api/copy" and record.model else record.model
        await context.ready_primary()  # without it nobody knows what there is
        if path == "/api/create":
            await self._refuse_foreign_base(other)
        before = await context.catalog.facts(changed_name) if changed_name else None
        if path == "/api/delete":
            return await self._delete(request, body, before, record)
        try:
            if path == "/api/pull" and record.model:
                return await self.pulls.serve(request, body, parsed, record)
            async with store_turn(context.writing, context.limits):
                return await forward(context, request, body, record)
        finally:
            context.catalog.forget_all()
            if before is not None and before.is_shared:
                self._start(self._remove_old_weights(before, changed_name))

    async def _check_rules(self, path: str, body: bytes, other: str, record: RequestRecord) -> None:
        """`other`: the second model that the body names.

        Raises:
            Forbidden: the operator's rules, or those of the request's key, do not allow it.
            DiskFull: there is no room on the disk.
        """
        rules = self._context.management
        if other:
            refuse_model(record.key, other)
            self._context.refuse_attached(other, "copied from or to")
        if path == "/api/create":
            if _is_limited(record) and _has_files(body):
                raise Forbidden("files, adapters: this access key is limited to models: create from one (`from`)")
            if _text_member(body, "remote_host") and not self._context.rules.cloud:
                raise Forbidden("remote_host: a model that another server runs is a cloud model (ollama.cloud)")
            rules.check_disk(0)
            await self._context.ready_primary()  # without it nobody knows what there is
            if other and await self._context.catalog.facts(other) is None:
                rules.refuse_pull(other)  # a server pulls what it does not have
        elif path == "/api/pull" and record.model:
            rules.refuse_pull(record.model)
            rules.check_disk(0)
        elif path == "/api/push":
            rules.refuse_push()

    async def close(self) -> None:
        """Cancels background cleanups."""
        for task in self._cleanups:
            task.cancel()
        await asyncio.gather(*self._cleanups, return_exceptions=True)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """In the background: a client that leaves must not cancel the cleanup."""
        task = asyncio.get_running_loop().create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    # --- blobs ---------------------------------------------------------------------------------------------

    async def _blob(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        """Streams uploads through unread: weights are far larger than any limit on a body held in memory.

        Raises:
            Forbidden: the key is limited to models. It could tell by a digest what others have, and create from none.
        """
        if _is_limited(record):
            raise Forbidden("blobs: this access key is limited to models: it creates from one (`from`), not from files")
        if request.method == hdrs.METH_HEAD:
            return await forward(self._context, request, b"", record)
        if await self._has_blob(request):
            # Responds at once without reading, as a server does, which spares the client the upload.
            present = web.Response(headers=record.response_headers())
            if (request.content_length or _UNREAD_BYTES_MAX) >= _UNREAD_BYTES_MAX:
                present.force_close()
            return present
        self._context.management.check_disk(request.content_length or 0)
        # Needs no store turn: nothing existing changes, and a slow client would block all others.
        return await forward(self._context, request, request.content.iter_any(), record)

    async def _has_blob(self, request: web.BaseRequest) -> bool:
        url = URL((await self._context.ready_primary()).spec.url + request.raw_path, encoded=True)
        try:
            async with (
                asyncio.timeout(_BLOB_QUERY_TIMEOUT_SECONDS),
                self._context.session.head(url, allow_redirects=False) as reply,
            ):
                return reply.status == web.HTTPOk.status_code
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise lost_by(error, f"the instance could not be queried for the blob: {error}") from error

    def _refuse_attached(self, facts: ModelFacts | None, verb: str) -> None:
        """
        Raises:
            Forbidden: only attached servers have the model.
        """
        if facts is not None and not facts.is_on(self._context.primary().spec):
            owners = ", ".join(sorted(facts.attached_on or ()))
            words = f"model '{facts.name}' is only on {owners}, which the router does not manage: {verb} it there"
            raise Forbidden(words)

    async def _refuse_foreign_base(self, base: str) -> None:
        """Refuses to create a model from one of an attached server: the store's server would pull that name instead.

        Raises:
            Forbidden: only attached servers have the base.
        """
        facts = await self._context.catalog.facts(base) if base else None
        self._refuse_attached(facts, "pull it through the router first, or create from")

    # --- deleting ------------------------------------------------------------------------------------------

    async def _delete(
        self, request: web.BaseRequest, body: bytes, facts: ModelFacts | None, record: RequestRecord
    ) -> web.StreamResponse:
        context = self._context
        if facts is None:
            return await self._deleted(request, body, record)
        names = await context.catalog.names_of(facts.blob)
        if any(name != facts.name for name in names):
            return await self._deleted(
                request, body, record
            )  # other names keep the weights, so nothing must be unloaded
        context.removing.add(facts.name)
        try:
            await self._unload(facts)
            return await self._deleted(request, body, record)
        finally:
            context.removing.discard(facts.name)

    async def _deleted(self, request: web.BaseRequest, body: bytes, record: RequestRecord) -> web.StreamResponse:
        async with store_turn(self._context.writing, self._context.limits):
            try:
                return await forward(self._context, request, body, record)
            finally:
                self._context.catalog.forget_all()

    async def _unload(self, facts: ModelFacts) -> None:
        """Returns once no instance has the weights loaded; running requests may finish first.

        Raises:
            WaitTimeout: an instance still has them loaded; nothing is deleted.
        """
        controller, blob, seconds = self._context.controller, facts.blob, self._context.limits.queue_timeout_seconds
        until = controller.now() + seconds
        while controller.now() < until:
            # Repeated, because a request admitted earlier may set another keep_alive.
            controller.post(UnloadRequested(blob, even_pinned=True))
            if await controller.until(
                lambda snapshot: all(key[1] != blob for key in snapshot.residencies), _UNLOAD_RETRY_SECONDS
            ):
                return
        raise WaitTimeout(f"model '{facts.name}' is still in use after {seconds:.0f} s and was not deleted")

    # --- unreferenced weights --------------------------------------------------------------------------------

    async def _remove_old_weights(self, before: ModelFacts, name: str) -> None:
        """Removes a name's former weights from the GPUs, and from the store if no other name refers to them.

        Never fails: the client's request has already succeeded. Loaded weights are unloaded by the driver, which
        removes the files as well; others are removed here.
        """
        context = self._context
        try:
            current = await context.catalog.facts(name)
            if (current is not None and current.blob == before.blob) or await context.catalog.names_of(before.blob):
                return
            context.controller.post(UnloadRequested(before.blob, even_pinned=True))
            if any(key[1] == before.blob for key in context.controller.snapshot().residencies):
                return
            client = OllamaClient(context.session, context.primary().spec.url)
            async with context.writing:
                await client.create(temporary_tag_for(before.blob), before.blob, _STORE_TIMEOUT_SECONDS)
                await client.delete(temporary_tag_for(before.blob))
        except (OllamaError, NoInstance, ShuttingDown) as error:
            self._log.warning("old_weights_stay", model=before.name, blob=before.blob, why=error.message)


def _is_limited(record: RequestRecord) -> bool:
    """Whether the request's key may use some models only."""
    return record.key is not None and not record.key.sees_all_models


def _has_files(body: bytes) -> bool:
    """Whether a new model is made from uploaded files: any client can name those of any model by their digests."""
    try:
        return any(last_value(body, name) for name in ("files", "adapters"))
    except (Malformed, TooComplex):
        return True


def _text_member(body: bytes, name: str) -> str:
    """A member of the body, such as the target name of a copy; "" if there is none, or the server will reject it."""
    try:
        value = last_value(body, name)
    except Malformed:
        return ""
    return text_of(value) if value.startswith(b'"') else ""
