"""One leased request, from its whole body until its answer is out: the lease, the server, the retries, the books.

What the request means is worked out by `llm_api/inference_request.py`, step by step as it says there. Phases: ASKING
what the servers can and what the model is; WAITING in the engine's queue, whose deadline is the engine's (cold loads
included); OPENING a connection; then ASKED, which belongs to a `ResponseStream`, until ENDED. A client that waits long
may get heartbeats until the reply begins; its answer's head is then out, and what goes wrong later is told within the
stream.

Nothing is retried once a byte of a server's answer has gone to the client. Before that, a pooled connection that its
server closed as it was used again is replaced by a fresh one, once, within the same slot; and a runner or server that
died is reported to the engine, and the request takes its place in the queue again, at most `ATTEMPTS` times in all.
Each grant is given back exactly once, whatever happens, and each request ends in the books exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import structlog

from router.admission.client_identity import ClientIdentity
from router.admission.origin_check import Answer
from router.api.forwarding import Exchange as Record
from router.control.controller import rejection
from router.domain.actions import Grant, Reject
from router.domain.events import UnloadRequested
from router.domain.instance import InstanceView
from router.domain.model import ModelFacts
from router.domain.request import TicketId
from router.engines.ollama.client import OllamaError
from router.engines.ollama.endpoint_support import refuse_missing
from router.errors import InstanceLost, RouterError
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.errors import api_of, error_reply
from router.llm_api.fast_body_reader import parse_body_fast
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import InferenceRequest
from router.llm_api.routing_request import RoutingRequest, reply_notes, unloaded
from router.observability.request_record import RequestRecord
from router.proxy.context import HeadInfo, ProxyContext
from router.proxy.heartbeat import HeartbeatSender
from router.proxy.interfaces import Requester
from router.proxy.plan_cache import again, recall, remember
from router.proxy.response_stream import ResponseStream
from router.proxy.upstream_pool import Opening, UpstreamConnection

ATTEMPTS: Final = 3
ONE_WRITE_BYTES_MAX: Final = 65536
CLIENT_GONE: Final = 499
"""nginx's status for a client that left before its answer; only logs and metrics see it."""

ASKING, WAITING, OPENING, ASKED, ENDED = range(5)


class ProxyExchange:
    """Tells its client what to send, and is told what happens on either side."""

    _phase = ASKING
    _attempt = 1
    _fresh = False
    _asked: InferenceRequest | None = None
    _client_identity = ClientIdentity()
    _heart: HeartbeatSender | None = None
    _task: asyncio.Task[None] | None = None
    _lease: TicketId | None = None
    """The ticket that waits, or the slot that is held."""
    _grant: Grant | None = None
    _wanted: RoutingRequest | None = None
    _opening: Opening | None = None
    _reply: ResponseStream | None = None
    _seen: ParsedBody | None = None
    """What the body says, where that is known already."""
    _body = b""
    """What is sent on."""

    def __init__(
        self, context: ProxyContext, client: Requester, head: RequestHead, path: str, info: RequestRecord
    ) -> None:
        self._context = context
        self._client = client
        self._head = head
        self._path = path
        self._info = info
        context.request_log.began()

    # --- what it is about ------------------------------------------------------------------------------------

    def begin(self, body: bytes) -> None:
        """The whole body has come."""
        self._body = body
        notes: HeadInfo = self._head.notes
        try:
            view = self._context.primary() if notes.is_young else None
            if view is None or self._context.endpoint_support.known(view, self._path):
                self._look()
            else:
                self._start(self._ask_ability(view))
        except RouterError as error:
            self.fail(error)

    def more(self) -> None:
        """A part of the body has come."""

    async def _ask_ability(self, view: InstanceView) -> None:
        if await self._context.endpoint_support.has(view, self._path):
            self._look()
        else:
            refuse_missing(view, self._path)
            self._connect(view.spec.url)

    def _look(self) -> None:
        context, head, info = self._context, self._head, self._info
        notes: HeadInfo = head.notes
        body, path = self._body, self._path
        seen = self._seen or (None if notes.is_form else parse_body_fast(body, path) or parse_body(body, path))
        if seen is not None and self._is_usual(seen, notes):
            return
        self._asked = request = InferenceRequest(
            context.rules, path, body, head.text, info.client, context.gpus, seen, notes.client_identity
        )
        self._client_identity = request.client_identity
        if request.client_identity.layout is None:  # GPUs come and go
            notes.client_identity = request.client_identity
        info.client = request.client_identity.client
        info.notes = request.notes
        self._expect(request.heartbeat)
        self._find(request)

    def _is_usual(self, seen: ParsedBody, notes: HeadInfo) -> bool:
        """Whether one like it has come before: then it is on its way."""
        usual = recall(notes.usual, seen)
        if usual is None:
            return False
        context = self._context
        routing = again(usual, context.catalog.known(seen.model or ""), seen, self._body, context.rules)
        if routing is None:
            return False
        self._client_identity, self._wanted = usual.client_identity, routing
        self._info.client, self._info.model = usual.client_identity.client, routing.facts.name
        self._expect(usual.heartbeat)
        self._submit(routing)
        return True

    def _expect(self, heartbeat: Heartbeat | None) -> None:
        if heartbeat is not None:
            self._heart = HeartbeatSender(heartbeat, self._client, self._head, self._context.controller.now())

    def _find(self, request: InferenceRequest) -> None:
        """The model that was asked for, or the next that may stand in for it."""
        if not request.model:
            self._as_it_is(request)
            return
        facts = self._context.catalog.known(request.model)
        if facts is None:
            self._phase = ASKING
            self._start(self._ask_facts(request))
        else:
            self._routing(request, facts)

    async def _ask_facts(self, request: InferenceRequest) -> None:
        facts = await self._context.catalog.facts(request.model)
        if facts is not None:
            self._routing(request, facts)
        elif request.instead("model_not_found"):
            self._find(request)
        elif request.error is not None:
            self.fail(request.error)
        else:
            self._as_it_is(request)

    def _routing(self, request: InferenceRequest, facts: ModelFacts) -> None:
        self._info.model = facts.name
        try:
            if request.unloads():
                self._context.controller.post(UnloadRequested(facts.blob))
                said = msgspec.json.encode(unloaded(self._path, request.named, datetime.now(UTC)))
                self.answer(Answer(200, (("Content-Type", "application/json; charset=utf-8"),), said))
                return
            self._wanted = routing = request.routing(facts)
        except RouterError as error:
            self._refused(error)
            return
        notes = reply_notes(routing)
        self._info.notes = {**request.notes, **notes} if notes else request.notes
        remember(self._head.notes.usual, request, routing, self._context.rules)
        self._submit(routing)

    def _refused(self, error: RouterError) -> None:
        """This model does not answer; perhaps another may instead."""
        request = self._asked
        if request is not None and request.instead(error.code, error):
            self._attempt = 1
            self._find(request)
        else:
            self.fail((request.error if request is not None else None) or error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._context.tasks.start(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OllamaError as error:
            self.fail(InstanceLost(f"the instance cannot be asked: {error.message}"))
        except RouterError as error:
            self.fail(error)
        except Exception:  # the outermost edge of a task
            structlog.get_logger("router.proxy").exception("request_crashed", request_id=self._info.request_id)
            self.fail(RouterError("the router met an error of its own; its log tells"))

    # --- to the server ---------------------------------------------------------------------------------------

    def _submit(self, routing: RoutingRequest) -> None:
        controller, seconds = self._context.controller, self._context.limits.queue_timeout_seconds
        self._phase = WAITING
        self._lease = number = controller.new_ticket_id()
        ticket = routing.ticket(number, self._client_identity, controller.now(), seconds, self._info.request_id)
        controller.submit(ticket, self._decided)
        if self._phase == WAITING and self._heart is not None and self._heart.waits(ticket.arrived_at):
            self.check(ticket.arrived_at)

    def _decided(self, decision: Grant | Reject) -> None:
        if isinstance(decision, Reject):
            self._lease = None
            self._refused(rejection(decision))
            return
        self._grant = decision
        self._info.granted(decision, self._context.controller.now())
        if self._wanted is not None:
            self._body = self._wanted.body_for(decision)
        self._connect(decision.url)

    def _as_it_is(self, request: InferenceRequest) -> None:
        """To one instance, without a slot: it answers with words of its own."""
        self._info.notes = {}
        self._body = request.original
        try:
            self._connect(self._context.primary().spec.url)
        except RouterError as error:
            self.fail(error)

    def _connect(self, url: str) -> None:
        self._phase = OPENING
        connection = None if self._fresh else self._context.pool.take(url)
        if connection is not None:
            self._send(connection)
        else:
            self._opening = self._context.pool.open(url, self._send, self._unreachable)

    def _send(self, connection: UpstreamConnection) -> None:
        self._opening = None
        self._phase = ASKED
        context, head, body = self._context, self._head, self._body
        self._reply = reply = ResponseStream(
            self, self._client, head, self._path, connection, context.limits, context.controller.now
        )
        if self._heart is not None:
            reply.begun = self._heart.begun
        reply.last = self._attempt == ATTEMPTS
        notes: HeadInfo = head.notes
        begun = notes.begun.get(connection.url) or notes.begin(head, connection.url, context.pool)
        first = b"%sContent-Length: %d\r\n\r\n" % (begun, len(body))
        if len(body) <= ONE_WRITE_BYTES_MAX:
            connection.transport.write(first + body)
        else:
            connection.transport.writelines((first, body))

    def _unreachable(self, error: Exception) -> None:
        self._opening = None
        self.reply_lost(InstanceLost(f"the instance could not be reached: {error}"), stale=False)

    # --- from the server -------------------------------------------------------------------------------------

    def own_headers(self) -> Mapping[str, str]:
        return self._info.reply_headers(self._grant)

    def reply_begins(self) -> None:
        self._heart = None
        self._asked = None
        self._body = b""
        self._wanted = self._grant = None  # what a thousand streams need no more is a megabyte

    def request_blocked(self, *, blocked: bool) -> None:
        pass  # the whole request is written already

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        if stale and not self._fresh:
            self._fresh = True
            reply = self._reply
            assert reply is not None
            self._connect(reply.connection.url)
            return
        routing = self._wanted
        self._give_back(runner_lost=True)
        self._fresh = False
        if routing is None or self._attempt == ATTEMPTS:
            self._refused(error)
            return
        log = structlog.get_logger("router.request")
        log.warning("tried again", request_id=self._info.request_id, model=self._info.model, why=str(error))
        self._attempt += 1
        self._submit(routing)

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        self._give_back(runner_lost=hangs)
        self._refused(error)

    def reply_broken(self, error: RouterError, *, keep: bool, died: bool) -> None:
        self._info.error_code = error.code
        self._give_back(runner_lost=died)
        self._finish_record(self._reply.status if self._reply else 0)
        self._client.answered(keep=keep)

    def reply_done(self, *, reusable: bool, keep: bool, died: bool) -> None:
        reply = self._reply
        assert reply is not None
        if reusable:
            if self._client.write_paused:
                reply.resume()
            self._context.pool.release(reply.connection)
        else:
            reply.connection.abort()
        self._give_back(runner_lost=died)
        self._finish_record(reply.status)
        self._client.answered(keep=keep)

    # --- endings ---------------------------------------------------------------------------------------------

    def fail(self, error: RouterError) -> None:
        """Ends with an error in the shape of the API that was called. No byte of a server's answer is out."""
        if self._phase == ENDED:
            return
        self._info.error_code = error.code
        heart = self._heart
        if heart is not None and heart.begun:
            self._finish_record(error.status)
            self._client.answered(keep=heart.end(error) and self._client.may_keep())
            return
        reply = error_reply(api_of(self._path), error, self._info.request_id)
        self.answer(Answer(reply.status, reply.headers, reply.body))

    def answer(self, answer: Answer) -> None:
        """Ends with a whole answer of the router's own."""
        headers = (*answer.headers, *self._info.reply_headers(None).items())
        self._finish_record(answer.status)
        self._client.answer(Answer(answer.status, headers, answer.body))

    def client_gone(self) -> None:
        """Wherever it stands, it ends: the ticket is withdrawn, or the generation stopped and the slot given back."""
        if self._phase == ENDED:
            return
        if self._task is not None:
            self._task.cancel()
        if self._opening is not None:
            self._opening.cancel()
        if self._phase == ASKED and self._reply is not None:
            self._reply.cancel()
        if self._phase == WAITING and self._lease is not None:
            lease, self._lease = self._lease, None
            self._context.controller.cancel(lease)
        self._give_back(runner_lost=False)
        self._finish_record(CLIENT_GONE)

    def _give_back(self, *, runner_lost: bool) -> None:
        """The slot, where one is held."""
        lease, reply = self._lease, self._reply
        self._lease = self._grant = None
        if lease is not None:
            tokens, first = (reply.chunks, reply.first_byte_at) if reply is not None else (0, None)  # a chunk a token
            self._context.controller.release(lease, runner_lost=runner_lost, output_tokens=tokens, first_byte_at=first)

    def _finish_record(self, status: int) -> None:
        self._phase = ENDED
        info, reply = self._info, self._reply
        if reply is not None:
            first, last = reply.first_byte_at, reply.last_byte_at
            info.exchange = Record(
                self._context.controller.now, reply.status, first, last, reply.bytes_out, reply.chunks, reply.tail()
            )
            self._reply = None  # they refer to each other, and what is not in use must be free at once, to be used warm
        self._context.request_log.ended(info, self._head.method.decode(), self._path, status)

    # --- from the client's connection ------------------------------------------------------------------------

    def pause(self) -> None:
        if self._phase == ASKED and self._reply is not None:
            self._reply.pause()

    def resume(self) -> None:
        if self._phase == ASKED and self._reply is not None:
            self._reply.resume()

    def check(self, now: float) -> None:
        """Looks at the deadlines; to be called now and then."""
        if (heart := self._heart) is not None and heart.is_due(now):
            heart.beat(now, self._info.reply_headers(None), self._context.controller, self._lease, self._grant)
            if self._reply is not None:
                self._reply.begun = True
        if self._phase == ASKED and self._reply is not None:
            self._reply.check(now)
