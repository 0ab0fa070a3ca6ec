"""One inference request, from its complete body until its response is out: slot, server, retries, record.

What the request means is worked out by `llm_api/inference_request.py`, in the steps listed there. Phases: RESOLVING
what the servers support and what the model is; WAITING in the controller's queue, which enforces the deadline
(including cold loads); CONNECTING to the server; then RELAYING, where a `ResponseStream` is in charge, until ENDED. A
client that waits long may get heartbeats until the reply begins. Its response's head is then out, and later errors are
reported within the stream.

Nothing is retried once a byte of a server's reply has gone to the client. Before that, a pooled connection that the
server had already closed is replaced by a new one, once, within the same slot. A runner or server that died is reported
to the controller, and the request is queued again, with its first deadline and at most `ATTEMPTS` times in all. So is
one that was answered with a status of 500 or more, if another replica can serve it. A budget bounds the retries of all
requests together. Each grant is released exactly once, and each request ends in the access log exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import structlog
from msgspec import structs

from router.control.controller import rejection
from router.domain.actions import Grant, Reject
from router.domain.client_identity import ClientIdentity
from router.domain.events import UnloadRequested
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceName, InstanceView
from router.domain.model import ModelFacts
from router.domain.request import TicketId
from router.engines.ollama.client import OllamaError, not_queried
from router.engines.ollama.endpoint_support import refuse_missing
from router.errors import (
    InstanceLost,
    InstanceUnreachable,
    NoInstance,
    QueueFull,
    RouterError,
    WaitTimeout,
    is_out_of_descriptors,
)
from router.http1.parser import RequestHead
from router.http1.response_writer import LocalResponse
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.content_encoding import DECOMPRESSED_BYTES_MAX, decompressed
from router.llm_api.errors import JSON, api_of, error_reply, internal_error
from router.llm_api.fast_body_reader import Outline, outline_of, parse_body_fast
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import KEEP_ALIVE, InferenceRequest, read_request, unload_reply
from router.llm_api.json_edit import spliced
from router.observability.request_record import CLIENT_GONE, RequestRecord
from router.observability.running_request import RunningRequest, running_request
from router.proxy.context import ProxyContext
from router.proxy.head_cache import CachedPlan, HeadFacts, PlanKey
from router.proxy.heartbeat import HeartbeatSender
from router.proxy.interfaces import Requester
from router.proxy.response_stream import ResponseStream
from router.proxy.upstream_pool import Opening, UpstreamConnection

ATTEMPTS: Final = 3
ONE_WRITE_BYTES_MAX: Final = 65536
"""Up to this length head and body are sent in one write."""
STEP_BYTES: Final = 262_144
"""A longer body is written in such steps, as far as its server takes it: a transport may copy what it cannot send."""
_SILENCE_SECONDS: Final = 5.0
"""A shorter silence says nothing about a replica: its client left between two tokens, or before a usual first one."""

RESOLVING, WAITING, CONNECTING, RELAYING, ENDED = range(5)
_NEVER: Final = float("inf")
_NO_DESCRIPTORS: Final = "the router has no file descriptor left for a connection to an instance: raise LimitNOFILE"


class ProxyExchange:
    """Serves one request of `client`. Defaults are class attributes, so that most requests store little."""

    _phase = RESOLVING
    _attempt = 1
    _submitted_at = 0.0
    """When it first asked for a slot: further attempts share its deadline."""
    _avoid: InstanceName | None = None
    """The instance that has failed it."""
    _was_stale = False
    """Whether a pooled connection turned out to be closed: then a new one is opened."""
    _request: InferenceRequest | None = None
    _heartbeat: Heartbeat | None = None
    _heartbeat_due = _NEVER
    _heartbeat_sender: HeartbeatSender | None = None
    _task: asyncio.Task[None] | None = None
    _lease: TicketId | None = None
    """The waiting ticket, or the slot that is held."""
    _grant: Grant | None = None
    _opening: Opening | None = None
    _reply: ResponseStream | None = None
    _parsed: ParsedBody | None = None
    """What the body says, if it has been parsed already."""
    _settings: PlanKey | None = None
    """Those of a body for which no plan was cached."""
    _has_keep_alive = False
    """Whether the body has the router's `keep_alive` already."""
    _body = b""
    """As it is forwarded."""
    _unsent: memoryview | None = None
    """The rest of a body that is written in steps."""
    _is_blocked = False
    """Whether the server takes no more of the request for now."""

    def __init__(
        self,
        context: ProxyContext,
        client: Requester,
        head: RequestHead,
        facts: HeadFacts,
        record: RequestRecord,
        client_identity: ClientIdentity,
    ) -> None:
        self._context = context
        self._client = client
        self._head = head
        self._facts = facts
        self._record = record
        self._client_identity = client_identity
        context.request_log.began()

    # --- what it asks for ------------------------------------------------------------------------------------

    def begin(self, body: bytes) -> None:
        """The body is complete."""
        self._body = body
        try:
            if self._facts.is_zstd and body:
                self._start(self._decompress(body))
            elif self._facts.is_young:
                self._check_support()
            else:
                self._resolve()
        except RouterError as error:
            self.fail(error)

    async def _decompress(self, body: bytes) -> None:
        """In a thread: a few bytes may decompress to many, and must not delay other requests."""
        bytes_max = min(DECOMPRESSED_BYTES_MAX, self._context.limits.max_body_bytes)
        self._body = await asyncio.to_thread(decompressed, body, bytes_max)
        if self._facts.is_young:
            self._check_support()
        else:
            self._resolve()

    def body_progressed(self) -> None:
        """A part of the body has come."""

    def _check_support(self) -> None:
        """For paths that older servers do not have."""
        try:
            view = self._context.primary()
        except NoInstance:
            self._start(self._query_support(None))
            return
        if self._context.endpoint_support.known(view, self._facts.path):
            self._resolve()
        else:
            self._start(self._query_support(view))

    async def _query_support(self, view: InstanceView | None) -> None:
        view = view or await self._context.ready_primary()
        if await self._context.endpoint_support.has(view, self._facts.path):
            self._resolve()
        else:
            refuse_missing(view, self._facts.path)
            self._connect(view.spec.url)

    def _resolve(self) -> None:
        facts, body = self._facts, self._body
        path, parsed = facts.path, self._parsed
        if parsed is None and not facts.is_form:
            seen = outline_of(body, path)
            if seen is not None and self._resolve_alike(seen):
                return
            self._settings = seen.settings if seen is not None else None
            parsed = parse_body_fast(body, path) or parse_body(body, path)
        self._read(parsed)

    def _resolve_alike(self, seen: Outline) -> bool:
        """Plans the request as an earlier one with the same settings; False if there was none."""
        context, body = self._context, self._body
        cached = self._facts.plans.get(seen.settings)
        if cached is None:
            return False
        plan, heartbeat, parsed, rules_version = cached
        model = parsed.model or ""
        rules = context.rules
        if (
            context.catalog.known(model) is not plan.facts
            or plan.facts.name in rules.removing
            or rules_version != rules.version
        ):
            return False
        if parsed.prompt_bytes != seen.prompt_bytes:
            parsed = structs.replace(parsed, prompt_bytes=seen.prompt_bytes)
        span = seen.keep_alive if plan.keep_alive_seconds is not None else None
        self._request = request = InferenceRequest(
            path=self._facts.path,
            rules=context.rules,
            client_identity=self._client_identity,
            original_body=body,
            body=body if span is None else spliced(body, span, KEEP_ALIVE),
            parsed=parsed,
            requested_model=model,
            model=model,
            plan=plan,
        )
        self._record.model = plan.facts.name
        if heartbeat is not None:
            self._heartbeat = heartbeat
            self._heartbeat_due = context.controller.now() + heartbeat.seconds
        self._submit(request)
        return True

    def _read(self, parsed: ParsedBody | None) -> None:
        """The full path, for a request that no cached plan fits."""
        context = self._context
        self._request = request = read_request(
            context.rules, self._facts.path, self._body, self._head.text, self._client_identity, parsed
        )
        request.has_keep_alive = self._has_keep_alive
        self._record.substitution_headers = request.substitution_headers
        heartbeat = self._heartbeat = request.heartbeat
        if heartbeat is not None:
            self._heartbeat_due = context.controller.now() + heartbeat.seconds
        self._find_model(request)

    def _find_model(self, request: InferenceRequest) -> None:
        """Looks up the requested model, or the next that may answer instead."""
        if not request.model:
            self._forward_unchanged(request)
            return
        facts = self._context.catalog.known(request.model)
        if facts is None:
            self._phase = RESOLVING
            self._start(self._fetch_facts(request))
        else:
            self._plan(request, facts)

    async def _fetch_facts(self, request: InferenceRequest) -> None:
        try:
            facts = await self._context.find_model(request.model)
        except NoInstance as error:
            self._refuse(error)
            return
        if facts is not None:
            self._plan(request, facts)
        elif request.try_fallback("model_not_found"):
            self._find_model(request)
        elif request.error is not None:
            self.fail(request.error)
        else:
            self._forward_unchanged(request)

    def _plan(self, request: InferenceRequest, facts: ModelFacts) -> None:
        self._record.model = facts.name
        try:
            if request.only_unloads():
                self._context.controller.post(UnloadRequested(facts.blob))
                reply = unload_reply(self._facts.path, request.requested_model, datetime.now(UTC))
                headers = (("Content-Type", JSON),)
                self.respond(LocalResponse(200, headers, msgspec.json.encode(reply)))
                return
            message = request.refused_option()
            if message is not None:
                self._let_server_refuse(request, facts, message)
                return
            plan = request.plan_for(facts)
        except RouterError as error:
            self._refuse(error)
            return
        if self._settings is not None and request.is_repeatable:
            cached = CachedPlan(plan, request.heartbeat, request.parsed, request.rules.version)
            self._facts.add_plan(self._settings, cached)
        self._submit(request)

    def _refuse(self, error: RouterError) -> None:
        """This model cannot answer; perhaps a fallback can."""
        request = self._request
        plan = request.plan if request is not None else None
        if request is not None and plan is not None and plan.facts.is_opaque and error.code == "load_failed":
            self._forward_unchanged(request)  # a server may serve what it does not load in advance
            return
        if request is not None and request.try_fallback(error.code, error):
            self._attempt = 1
            self._find_model(request)
        else:
            self.fail((request.error if request is not None else None) or error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._context.tasks.start(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OllamaError as error:
            self.fail(not_queried(error))
        except RouterError as error:
            self.fail(error)
        except Exception:  # the outermost edge of a task
            request_id = self._record.request_id
            structlog.get_logger("router.proxy").exception("request_crashed", request_id=request_id)
            self.fail(internal_error(request_id))

    # --- to the server ---------------------------------------------------------------------------------------

    def _submit(self, request: InferenceRequest) -> None:
        context = self._context
        controller, limits, charge = context.controller, context.limits, self._record.charge
        if charge is not None:
            charge.reserve(*request.estimated_tokens())
        now = controller.now()
        self._phase = WAITING
        self._lease = ticket_id = controller.new_ticket_id()
        if self._attempt == 1:
            self._submitted_at = now
            context.retry_budget.request(now)
        ticket = request.ticket(ticket_id, self._submitted_at, limits.queue_timeout_seconds, self._record.request_id)
        if self._avoid is not None:
            ticket = replace(ticket, avoid=self._avoid)
        controller.submit(ticket, self._decided)
        if self._phase == WAITING and self._heartbeat is not None and self._heartbeat.reports_progress:
            self._heartbeat_due = now  # the first report is due at once
            self.check(now)

    def _decided(self, decision: Grant | Reject) -> None:
        record, request = self._record, self._request
        if isinstance(decision, Reject):
            self._lease = None
            if request is not None and request.keep_context(decision.code):
                self._submit(request)
            else:
                self._refuse(rejection(decision))
            return
        self._grant = decision
        record.instance = decision.instance
        record.granted_at = self._context.controller.now()
        if request is not None:
            plan = request.plan
            fits = plan is None or decision.options == plan.options
            self._body = request.body if fits else request.body_for(decision)
            if plan is not None and request.parsed.prompt_bytes > plan.prompt_bytes_max:
                self._note_context(request, decision)
        self._connect(decision.url)

    def _note_context(self, request: InferenceRequest, grant: Grant) -> None:
        if request.note_context(grant.context_length):
            log = structlog.get_logger("router.request")
            log.warning(
                "prompt_exceeds_context",
                request_id=self._record.request_id,
                model=self._record.model,
                context_length=grant.context_length,
                prompt_bytes=request.parsed.prompt_bytes,
            )
        self._record.substitution_headers = request.substitution_headers

    def _forward_unchanged(self, request: InferenceRequest) -> None:
        """To one instance, without a slot: it responds in its own words."""
        self._record.substitution_headers = {}
        self._record.is_unrouted = True
        self._body = request.original_body
        request.plan = None
        try:
            self._connect(self._context.primary().spec.url)
        except NoInstance:
            self._phase = RESOLVING
            self._start(self._forward_when_ready())
        except RouterError as error:
            self.fail(error)

    async def _forward_when_ready(self) -> None:
        self._connect((await self._context.ready_primary()).spec.url)

    def _let_server_refuse(self, request: InferenceRequest, facts: ModelFacts, message: str) -> None:
        """A server refuses the request before it loads anything, in its own words and order of checks."""
        primary = self._context.primary()
        if not facts.is_on(primary.spec):
            headers = (("Content-Type", JSON),)
            self.respond(LocalResponse(500, headers, msgspec.json.encode({"error": message})))
            return
        self._body = request.body
        request.plan = None
        self._connect(primary.spec.url)

    def _connect(self, url: str) -> None:
        self._phase = CONNECTING
        connection = None if self._was_stale else self._context.pool.take(url)
        if connection is not None:
            self._send(connection)
        else:
            self._opening = self._context.pool.open(url, self._send, self._unreachable)

    def _send(self, connection: UpstreamConnection) -> None:
        self._opening = None
        self._phase = RELAYING
        body = self._body
        reply = self._open_reply(connection)
        head = self._head_for(connection.url, len(body))
        if len(body) <= ONE_WRITE_BYTES_MAX:
            connection.transport.write(head + body)
            return
        reply.request_sent = self._is_blocked = False
        self._unsent = memoryview(body)
        connection.transport.write(head)
        self._write_unsent()

    def _open_reply(self, connection: UpstreamConnection) -> ResponseStream:
        context = self._context
        self._reply = reply = ResponseStream(
            self, self._client, self._head, self._facts.path, connection, context.limits, context.controller.now
        )
        if self._heartbeat_sender is not None:
            reply.head_sent = self._heartbeat_sender.head_sent
        reply.is_last_attempt = self._attempt == ATTEMPTS
        return reply

    def _head_for(self, url: str, body_bytes: int) -> bytes:
        """The request's head for that server."""
        facts = self._facts
        lines = facts.upstream_lines.get(url)
        if lines is None:
            authority = self._context.pool.authority(url)
            lines = facts.add_upstream_lines(self._head, url, authority, self._context.via)
        return b"%sContent-Length: %d\r\n\r\n" % (lines, body_bytes)

    def _write_unsent(self) -> None:
        unsent, reply = self._unsent, self._reply
        while unsent is not None and reply is not None and not self._is_blocked:
            self._unsent = unsent[STEP_BYTES:] if len(unsent) > STEP_BYTES else None
            reply.connection.transport.write(unsent[:STEP_BYTES])
            if self._unsent is None:
                reply.mark_request_sent()
            unsent = self._unsent

    def _unreachable(self, error: Exception) -> None:
        self._opening = None
        if is_out_of_descriptors(error):
            self._release(runner_lost=False)
            self._refuse(QueueFull(_NO_DESCRIPTORS, retry_after_seconds=1))
            return
        self.reply_lost(InstanceUnreachable(f"the instance could not be reached: {error}"), stale=False)

    # --- from the server -------------------------------------------------------------------------------------

    def response_begins(self) -> Mapping[str, str]:
        headers = self._record.response_headers(self._grant)
        if self._record.is_unrouted and self._reply is not None:
            headers |= self._record.unrouted_headers(self._reply.status)
        self._heartbeat_due = _NEVER
        self._body = b""
        # A thousand streams do not need these any more: about a megabyte.
        self._heartbeat = self._heartbeat_sender = self._request = self._grant = None
        return headers

    def progressed(self, now: float) -> None:
        self._context.progress_at[self._record.instance or "", self._record.model] = now

    def request_blocked(self, *, blocked: bool) -> None:
        self._is_blocked = blocked
        if not blocked:
            self._write_unsent()

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        if stale and not self._was_stale:
            self._was_stale = True
            reply = self._reply
            assert reply is not None
            self._connect(reply.connection.url)
            return
        request = self._request
        self._unsent = None
        self._release(runner_lost=True, failure=ReplyFailure.LOST)
        self._was_stale = False
        if request is None or request.plan is None or self._attempt == ATTEMPTS or not self._within_budget(str(error)):
            self._refuse(error)
        else:
            self._try_again(request, error)

    def may_try_elsewhere(self, status: int) -> bool:
        request, context, instance = self._request, self._context, self._record.instance
        if request is None or request.plan is None or self._lease is None or self._attempt == ATTEMPTS:
            return False
        if instance is None or not context.serves_elsewhere(request.plan.facts, instance):
            return False
        return self._within_budget(f"the instance answered {status}")

    def reply_refused(self, error: RouterError) -> None:
        request, failure = self._request, _failure_of(error.status)
        assert request is not None
        self._unsent = None
        self._avoid = self._record.instance
        self._release(runner_lost=False, failure=failure)
        self._was_stale = False
        self._try_again(request, error)

    def _within_budget(self, reason: str) -> bool:
        """Counts a retry, if the budget has one left."""
        context, record = self._context, self._record
        if context.retry_budget.try_retry(context.controller.now()):
            return True
        record.is_retry_refused = True
        log = structlog.get_logger("router.request")
        log.warning("retry_refused", request_id=record.request_id, model=record.model, reason=reason)
        return False

    def _try_again(self, request: InferenceRequest, error: RouterError) -> None:
        log = structlog.get_logger("router.request")
        log.warning("retrying", request_id=self._record.request_id, model=self._record.model, reason=str(error))
        self._record.retry_reasons += (error.retry_reason,)
        self._attempt += 1
        self._submit(request)

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        self._release(runner_lost=hangs, failure=ReplyFailure.TIMEOUT if hangs else ReplyFailure.LOST)
        self._refuse(error)

    def reply_broken(self, error: RouterError, *, keep: bool, died: bool) -> None:
        self._record.error_code = error.code
        failure = _failure_after_bytes(error, died=died)
        self._finish(self._reply.status if self._reply else 0, runner_lost=died, failure=failure)
        self._client.response_ended(keep=keep)

    def reply_done(self, *, reusable: bool, keep: bool, died: bool) -> None:
        reply, client = self._reply, self._client
        assert reply is not None
        if reusable:
            if client.write_paused:
                reply.resume()
            self._context.pool.release(reply.connection)
        else:
            reply.connection.abort()
        if reply.error_code:
            self._record.error_code = reply.error_code
        failure = ReplyFailure.LOST if died else None if reply.is_bad_option else _failure_of(reply.status)
        self._finish(reply.status, runner_lost=died, failure=failure)
        client.response_ended(keep=keep)

    # --- endings ---------------------------------------------------------------------------------------------

    def fail(self, error: RouterError) -> None:
        """Ends with an error in the shape of the API that was called. No byte of a server's reply is out."""
        if self._phase == ENDED:
            return
        record, sender = self._record, self._heartbeat_sender
        record.error_code = error.code
        if sender is not None and sender.head_sent:
            self._finish(error.status)
            self._client.response_ended(keep=sender.end(error) and self._client.may_keep())
            return
        self.respond(error_reply(api_of(self._facts.path), error, record.request_id))

    def respond(self, response: LocalResponse) -> None:
        """Ends with a whole response of the router's own."""
        headers = (*response.headers, *self._record.response_headers().items())
        self._finish(response.status)
        self._client.respond(LocalResponse(response.status, headers, response.body))

    def client_gone(self, status: int = CLIENT_GONE) -> None:
        """Ends in any phase: withdraws the ticket, or stops the server's work and releases the slot.

        `status`: what the client was sent instead of a response to this request.
        """
        if self._phase == ENDED:
            return
        silent_seconds = self._silent_seconds()
        self._abandon()
        self._finish(status, silent_seconds=silent_seconds)

    def cut(self, error: RouterError) -> None:
        """Ends in any phase with an error that the client sees, within the stream if that has begun."""
        if self._phase == ENDED:
            return
        if self._phase == RELAYING and self._reply is not None and self._reply.has_begun:
            self._reply.cut(error)
        else:
            self._abandon()
            self.fail(error)

    def _abandon(self) -> None:
        """Withdraws what is under way: a task, a ticket, a connection. A slot stays held until `_finish`."""
        if self._task is not None:
            self._task.cancel()
        if self._opening is not None:
            self._opening.cancel()
        if self._phase == RELAYING and self._reply is not None:
            self._reply.cancel()
        if self._phase == WAITING and self._lease is not None:
            lease, self._lease = self._lease, None
            self._context.controller.cancel(lease)

    def _silent_seconds(self) -> float:
        """For how long this request has waited while the replica sent no byte to any client; 0 if that is short."""
        record, reply, context = self._record, self._reply, self._context
        if self._phase != RELAYING or reply is None or self._client.write_paused:
            return 0.0
        since = max(record.granted_at or 0.0, context.progress_at.get((record.instance or "", record.model), 0.0))
        if reply.first_byte_at is not None:
            since = max(since, reply.first_byte_at)
        silent_seconds = context.controller.now() - since if record.granted_at is not None else 0.0
        return silent_seconds if silent_seconds >= _SILENCE_SECONDS else 0.0

    def _release(self, *, runner_lost: bool, failure: ReplyFailure | None = None) -> None:
        """Releases the slot, if one is held, of a request that does not end yet."""
        lease, self._lease, self._grant = self._lease, None, None
        if lease is not None:
            self._context.controller.release(lease, runner_lost=runner_lost, failure=failure)

    def _finish(
        self,
        status: int,
        *,
        runner_lost: bool = False,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> None:
        """Releases the slot, if one is held, and ends the request in the access log."""
        self._phase = ENDED
        if self._unsent is not None:
            self._unsent = None
        record, reply = self._record, self._reply
        lease, self._lease, self._grant = self._lease, None, None
        if lease is not None:  # a chunk is about a token
            tokens, first_byte_at = (0, None) if reply is None else (reply.chunks, reply.first_byte_at)
            self._context.controller.release(
                lease,
                runner_lost=runner_lost,
                output_tokens=tokens,
                first_byte_at=first_byte_at,
                silent_seconds=silent_seconds,
                failure=failure,
            )
        if reply is not None:
            record.first_byte_at, record.last_byte_at = reply.first_byte_at, reply.last_byte_at
            record.bytes_out, record.chunks, record.tail = reply.bytes_out, reply.chunks, reply.tail
            self._reply = None  # breaks a reference cycle, so that memory is free at once and reused while it is cached
        self._context.request_log.ended(record, "POST", self._facts.path, status)

    # --- from the client's connection ------------------------------------------------------------------------

    def pause(self) -> None:
        if self._phase == RELAYING and self._reply is not None:
            self._reply.pause()

    def resume(self) -> None:
        if self._phase == RELAYING and self._reply is not None:
            self._reply.resume()

    def check(self, now: float) -> None:
        """Checks the deadlines; to be called periodically."""
        if now >= self._heartbeat_due:
            self._beat(now)
        if self._phase == RELAYING and self._reply is not None:
            self._reply.check(now)

    def running(self) -> RunningRequest | None:
        """What is with a server now; None in other phases."""
        reply = self._reply
        if self._phase != RELAYING or reply is None:
            return None
        return running_request(self._record, reply.first_byte_at, reply.chunks_so_far)

    def _beat(self, now: float) -> None:
        heartbeat, sender = self._heartbeat, self._heartbeat_sender
        assert heartbeat is not None
        if sender is None:
            sender = self._heartbeat_sender = HeartbeatSender(heartbeat, self._client, self._head)
        self._heartbeat_due = now + heartbeat.seconds
        sender.beat(self._record.response_headers(), self._context.controller, self._lease, self._grant)
        if self._reply is not None:
            self._reply.head_sent = sender.head_sent


def _failure_of(status: int) -> ReplyFailure | None:
    """How a server has failed a request to which it answered with this status."""
    if status in (429, 503):
        return ReplyFailure.OVERLOADED
    return ReplyFailure.ERROR if status >= 500 else None


def _failure_after_bytes(error: RouterError, *, died: bool) -> ReplyFailure | None:
    """How a server has failed a request to which it had begun to answer; a slow client is no failure of the server."""
    if isinstance(error, WaitTimeout):
        return ReplyFailure.TIMEOUT if died else None
    return ReplyFailure.LOST
