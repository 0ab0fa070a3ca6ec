"""A request with a long body: forwarded while it still comes, where that is safe.

If the first pieces name the model and a replica of it has a free slot, that slot is taken and the pieces are forwarded
as they come, except for the end (`HELD_BYTES`). Until then the server cannot start to work: it reads a body to the end
of its one JSON value. Settings that come later are expected to be those of the client's last long body for that model.
A `keep_alive` is replaced where it is, by as many bytes, before these are sent.

Once the body is complete it is parsed as Go parses it. If it says what was expected, the rest is sent. Otherwise
(another `model` further back, other options, a `keep_alive` that has been sent) the server's connection is cut, the
slot released, and the request takes the ordinary path. So does one whose body takes longer than
`upload_slot_timeout_seconds`, and one whose server fails in the meantime. The body is kept until the reply begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.domain.actions import Grant, Reject
from router.domain.client_identity import ClientIdentity
from router.errors import InstanceLost, RouterError
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody
from router.llm_api.inference_request import KEEP_ALIVE, read_request
from router.llm_api.json_skimmer import Beginning
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
        self._expected: ParsedBody = ParsedBody()
        """What the body is expected to say, of a request that has started early."""
        self._kept_alive: tuple[int, int] | None = None
        """Where the router's `keep_alive` has been put into the body."""
        self._undo_at = float("inf")

    # --- while the body comes --------------------------------------------------------------------------------

    def body_progressed(self) -> None:
        """Another piece has come, and it is not the last."""
        if not self._early_decided:
            beginning = self._reader.beginning(self._facts.path)
            self._early_decided = beginning is not None or self._reader.count > 1
            if beginning is not None:
                self._begin_early(beginning)
        elif self._early and self._reply is not None:
            self._write(self._reply, self._reader.sendable_bytes)

    def _begin_early(self, beginning: Beginning) -> None:
        """Takes a slot if one is free; anything unusual is left until the body is complete."""
        context, path = self._context, self._facts.path
        model = beginning.parsed.model or ""
        facts = context.catalog.known(model)
        if facts is None or self._facts.is_young or not context.has_free_slot(facts):
            return
        expected = beginning.parsed
        if expected.keep_alive is None and not expected.options:
            expected = self._facts.long_bodies.get(model) or expected
        try:
            request = read_request(context.rules, path, b"{}", self._head.text, self._client_identity, expected)
            request.has_keep_alive = True
            request.plan_for(facts)
        except RouterError:
            return
        if request.substitution_headers or request.is_adapted:
            return
        if beginning.keep_alive is not None and not self._keep_alive_at(beginning.keep_alive):
            return
        self._early = True
        self._expected = expected
        self._request = request
        self._record.model = facts.name
        self._undo_at = context.controller.now() + context.limits.upload_slot_timeout_seconds
        self._submit(request)
        if self._phase == WAITING and self._lease is not None:
            lease, self._lease = self._lease, None
            context.controller.cancel(lease)
            self._undo(runner_lost=False)

    def _keep_alive_at(self, span: tuple[int, int]) -> bool:
        """Puts the router's `keep_alive` there, where there is room for it and it has not been sent."""
        start, end = span
        if self._kept_alive != span:
            if end - start < len(KEEP_ALIVE) or start < self._written:
                return False
            self._reader.overwrite(start, KEEP_ALIVE.ljust(end - start))
            self._kept_alive = span
        return True

    def _decided(self, decision: Grant | Reject) -> None:
        if not self._early or self._is_complete:
            super()._decided(decision)
        elif isinstance(decision, Reject) or not self._is_loaded_as_planned(decision):
            self._lease = None if isinstance(decision, Reject) else self._lease
            self._undo(runner_lost=False)
        else:
            super()._decided(decision)

    def _is_loaded_as_planned(self, grant: Grant) -> bool:
        plan = self._request.plan if self._request is not None else None
        return plan is None or plan.options == grant.options

    def _send(self, connection: UpstreamConnection) -> None:
        if not self._early:
            super()._send(connection)
            return
        self._opening = None
        self._phase = RELAYING
        reader, reply = self._reader, self._open_reply(connection)
        reply.request_sent = False
        connection.transport.write(self._head_for(connection.url, reader.length))
        self._written = 0
        self._write(reply, reader.stored_bytes if self._is_complete else reader.sendable_bytes)

    def _write(self, reply: ResponseStream, until: int) -> None:
        if until > self._written:
            for part in self._reader.parts(self._written, until):
                reply.connection.transport.write(part)
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
            if self._is_as_expected(parsed):
                if self._reply is not None:
                    self._write(self._reply, self._reader.stored_bytes)
                return
            if self._reply is not None and self._reply.has_begun:
                return  # the server replied without waiting for the rest, which is not sent
            self._undo(runner_lost=False)
        self._parsed = parsed
        self._has_keep_alive = self._may_keep_alive(parsed) and self._replace_keep_alive()
        self._facts.add_long_body(parsed)
        whole = self._reader.body()
        self._reader.release()
        super().begin(whole)

    def _is_as_expected(self, parsed: ParsedBody) -> bool:
        """Whether the whole body asks for what the slot was taken for. Replaces its `keep_alive`."""
        expected, request = self._expected, self._request
        is_plain = not (parsed.conflict or parsed.ambiguous or parsed.unreadable or parsed.is_load_only)
        is_same = (parsed.model, parsed.options, parsed.keep_alive) == (
            expected.model, expected.options, expected.keep_alive,
        )  # fmt: skip
        if not is_plain or not is_same or request is None or request.plan is None:
            return False
        if parsed.prompt_bytes > request.plan.prompt_bytes_max:
            request.parsed = parsed
            if request.raises_context:
                return False
            if self._grant is not None:
                self._note_context(request, self._grant)
        return parsed.keep_alive is None or self._replace_keep_alive()

    def _may_keep_alive(self, parsed: ParsedBody) -> bool:
        """Whether the router's `keep_alive` may be put into the body before its model is looked up."""
        facts = self._context.catalog.known(parsed.model or "")
        return facts is not None and not facts.is_opaque and parsed.keep_alive is not None and not parsed.ambiguous

    def _replace_keep_alive(self) -> bool:
        span = self._reader.find("keep_alive")
        return span is not None and self._keep_alive_at(span)

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
        self._written = 0
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
