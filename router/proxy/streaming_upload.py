"""A request with a long body: forwarded while it still comes, where that is safe.

If the first pieces name the model and a replica of it has a free slot, that slot is taken and the pieces are forwarded
as they come, except for the last. Until then the server cannot start to work: it reads a body to the end of its one
JSON value, which is in the piece held back. Once the body is complete it is parsed as Go parses it. If that gives the
same model and nothing else that the router must act on, the rest is sent. Otherwise (another `model` further back,
runner options, a `keep_alive` to replace) the server's connection is cut, the slot released, and the request takes the
ordinary path. So does one whose body takes longer than `upload_slot_timeout_seconds`, and one whose server fails in the
meantime. The body is kept until the reply begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.domain.actions import Grant, Reject
from router.domain.client_identity import ClientIdentity
from router.errors import InstanceLost, RouterError
from router.http1.headers import request_head
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody
from router.llm_api.inference_request import read_request
from router.observability.request_record import RequestRecord
from router.proxy.context import ProxyContext
from router.proxy.exchange import ENDED, RELAYING, RESOLVING, WAITING, ProxyExchange
from router.proxy.head_cache import HeadFacts
from router.proxy.interfaces import Requester
from router.proxy.request_body import RequestBodyReader
from router.proxy.response_stream import ResponseStream
from router.proxy.upstream_pool import UpstreamConnection


class StreamingUpload(ProxyExchange):
    """An exchange that also handles the pieces of its body as they come."""

    def __init__(
        self,
        context: ProxyContext,
        client: Requester,
        head: RequestHead,
        facts: HeadFacts,
        record: RequestRecord,
        client_identity: ClientIdentity,
        reader: RequestBodyReader,
    ) -> None:
        super().__init__(context, client, head, facts, record, client_identity)
        self._reader = reader
        self._early_decided = False
        """Whether it has been decided if the request starts early."""
        self._early = False
        """Whether the request has started before its whole body was parsed."""
        self._is_complete = False
        """Whether the whole body has come."""
        self._written = 0
        """Bytes of the body sent to the server."""
        self._undo_at = float("inf")

    # --- while the body comes --------------------------------------------------------------------------------

    def body_progressed(self) -> None:
        """Another piece has come, and it is not the last."""
        if not self._early_decided:
            model = self._reader.model()
            self._early_decided = model is not None or self._reader.count > 1
            if model is not None:
                self._begin_early(model)
        elif self._early and self._reply is not None:
            self._write(self._reply, self._reader.last_piece_at)

    def _begin_early(self, model: str) -> None:
        """Takes a slot if one is free; anything unusual is left until the body is complete."""
        context, path = self._context, self._facts.path
        facts = context.catalog.known(model)
        if facts is None or self._facts.is_young or not context.has_free_slot(facts):
            return
        parsed = ParsedBody(model=model)
        try:
            request = read_request(context.rules, path, b"{}", self._head.text, self._client_identity, parsed)
            plan = request.plan_for(facts)
        except RouterError:
            return
        if request.substitution_headers or plan.options:
            return
        self._early = True
        self._request = request
        self._record.model = facts.name
        self._undo_at = context.controller.now() + context.limits.upload_slot_timeout_seconds
        self._submit(request)
        if self._phase == WAITING and self._lease is not None:
            lease, self._lease = self._lease, None
            context.controller.cancel(lease)
            self._undo(runner_lost=False)

    def _decided(self, decision: Grant | Reject) -> None:
        if not self._early or self._is_complete:
            super()._decided(decision)
        elif isinstance(decision, Reject) or decision.options:
            self._lease = None if isinstance(decision, Reject) else self._lease
            self._undo(runner_lost=False)
        else:
            super()._decided(decision)

    def _send(self, connection: UpstreamConnection) -> None:
        if not self._early:
            super()._send(connection)
            return
        self._opening = None
        self._phase = RELAYING
        context, head, reader = self._context, self._head, self._reader
        self._reply = reply = ResponseStream(
            self, self._client, head, self._facts.path, connection, context.limits, context.controller.now
        )
        reply.request_sent = False
        host = context.pool.authority(connection.url)
        connection.transport.write(request_head(head.method, head.target, head.headers, host, reader.length))
        self._written = 0
        self._write(reply, reader.stored_bytes if self._is_complete else reader.last_piece_at)

    def _write(self, reply: ResponseStream, until: int) -> None:
        if until > self._written:
            reply.connection.transport.write(self._reader.part(self._written, until))
            self._written = until
        if self._is_complete:
            reply.mark_request_sent()

    def request_blocked(self, *, blocked: bool) -> None:
        super().request_blocked(blocked=blocked)
        if not self._is_complete:
            self._client.body_blocked(blocked=blocked)

    # --- once it is complete ---------------------------------------------------------------------------------

    def begin(self, body: bytes) -> None:
        """The body is complete: `_reader` has it."""
        del body
        self._is_complete = True
        self._client.body_blocked(blocked=False)
        self._undo_at = float("inf")
        try:
            parsed = self._reader.parse(self._facts.path)
        except RouterError as error:
            self._undo(runner_lost=False)
            self.fail(error)
            return
        if self._early:
            early_model = self._request.model if self._request is not None else None
            same_model = parsed.model == early_model and not parsed.conflict
            is_plain = not parsed.options and parsed.keep_alive is None and not parsed.unreadable
            if same_model and is_plain and self._is_context_enough(parsed):
                if self._reply is not None:
                    self._write(self._reply, self._reader.stored_bytes)
                return
            if self._reply is not None and self._reply.has_begun:
                return  # the server replied without waiting for the rest, which is not sent
            self._undo(runner_lost=False)
        self._parsed = parsed
        whole = self._reader.body()
        self._reader.release()
        super().begin(whole)

    def _is_context_enough(self, parsed: ParsedBody) -> bool:
        """Whether the prompt fits into the default context, as far as that can be said."""
        plan = self._request.plan if self._request is not None else None
        return plan is None or parsed.prompt_bytes <= plan.prompt_bytes_max

    # --- when it goes wrong ----------------------------------------------------------------------------------

    def _undo(self, *, runner_lost: bool) -> None:
        """Back to the state before the early start."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._reply is not None:
            self._reply.cancel()
            self._reply = None
        self._release(runner_lost=runner_lost)
        self._early = False
        self._request = None
        self._phase = RESOLVING
        self._undo_at = float("inf")
        self._client.body_blocked(blocked=False)

    def response_begins(self) -> Mapping[str, str]:
        self._undo_at = float("inf")
        if self._is_complete:
            self._reader.release()
        return super().response_begins()

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        if not self._early:
            super().reply_lost(error, stale=stale)
            return
        self._reply = None
        self._undo(runner_lost=not stale)
        self._attempt += not stale
        if self._is_complete:
            self.begin(b"")

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        if self._early:
            self._request = None  # no fallback
        super().reply_failed(error, hangs=hangs)

    def fail(self, error: RouterError) -> None:
        if self._early and self._phase != ENDED:
            if self._reply is not None and self._reply.has_begun:
                self.client_gone()
                self._client.abort()
                return
            self._undo(runner_lost=False)
        super().fail(error)

    def check(self, now: float) -> None:
        if now >= self._undo_at:
            self._undo(runner_lost=False)
        super().check(now)
