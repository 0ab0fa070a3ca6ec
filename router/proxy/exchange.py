"""One leased request, from its whole body until its answer is out: the lease, the server, the retries, the books.

What the request means is worked out by `llm_api/inference_request.py`, step by step as it says there. Phases: ASKING
what the servers can and what the model is; WAITING in the engine's queue, whose deadline is the engine's (cold loads
included); OPENING a connection; then ASKED, which belongs to a `ReplyRelay`, until ENDED. A client that waits long may
get heartbeats until the reply begins; its answer's head is then out, and what goes wrong later is told within the
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

from router.admission.client_identity import Asker
from router.admission.origin_check import Answer
from router.api.forwarding import Exchange as Record
from router.control.controller import rejection
from router.domain.actions import Grant, Reject
from router.domain.events import UnloadAsked
from router.domain.instance import InstanceView
from router.domain.model import ModelFacts
from router.domain.request import TicketId
from router.engines.ollama.client import OllamaError
from router.engines.ollama.endpoint_support import refuse_missing
from router.errors import InstanceLost, RouterError
from router.http1.parser import RequestHead
from router.llm_api.body_reader import Peek, peek
from router.llm_api.errors import api_of, error_reply
from router.llm_api.fast_body_reader import glance
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import Asked
from router.llm_api.routing_request import Wanted, reply_notes, unloaded
from router.observability.request_record import RequestInfo
from router.proxy.context import Desk, HeadNotes
from router.proxy.heartbeat import Heart
from router.proxy.interfaces import Requester
from router.proxy.plan_cache import again, recall, remember
from router.proxy.response_stream import ReplyRelay
from router.proxy.upstream_pool import Opening, UpstreamConnection

ATTEMPTS: Final = 3
ONE_WRITE_BYTES_MAX: Final = 65536
CLIENT_GONE: Final = 499
"""nginx's status for a client that left before its answer; only logs and metrics see it."""

ASKING, WAITING, OPENING, ASKED, ENDED = range(5)


class LeasedExchange:
    """Tells its client what to send, and is told what happens on either side."""

    _phase = ASKING
    _attempt = 1
    _fresh = False
    _asked: Asked | None = None
    _asker = Asker()
    _heart: Heart | None = None
    _task: asyncio.Task[None] | None = None
    _lease: TicketId | None = None
    """The ticket that waits, or the slot that is held."""
    _grant: Grant | None = None
    _wanted: Wanted | None = None
    _opening: Opening | None = None
    _reply: ReplyRelay | None = None
    _seen: Peek | None = None
    """What the body says, where that is known already."""
    _body = b""
    """What is sent on."""

    def __init__(self, desk: Desk, client: Requester, head: RequestHead, path: str, info: RequestInfo) -> None:
        self._desk = desk
        self._client = client
        self._head = head
        self._path = path
        self._info = info
        desk.books.began()

    # --- what it is about ------------------------------------------------------------------------------------

    def begin(self, body: bytes) -> None:
        """The whole body has come."""
        self._body = body
        notes: HeadNotes = self._head.notes
        try:
            view = self._desk.primary() if notes.is_young else None
            if view is None or self._desk.abilities.known(view, self._path):
                self._look()
            else:
                self._start(self._ask_ability(view))
        except RouterError as error:
            self.fail(error)

    def more(self) -> None:
        """A part of the body has come."""

    async def _ask_ability(self, view: InstanceView) -> None:
        if await self._desk.abilities.has(view, self._path):
            self._look()
        else:
            refuse_missing(view, self._path)
            self._connect(view.spec.url)

    def _look(self) -> None:
        desk, head, info = self._desk, self._head, self._info
        notes: HeadNotes = head.notes
        body, path = self._body, self._path
        seen = self._seen or (None if notes.is_form else glance(body, path) or peek(body, path))
        if seen is not None and self._is_usual(seen, notes):
            return
        self._asked = asked = Asked(desk.rules, path, body, head.text, info.client, desk.cards, seen, notes.asker)
        self._asker = asked.asker
        if asked.asker.layout is None:  # cards come and go
            notes.asker = asked.asker
        info.client = asked.asker.client
        info.notes = asked.notes
        self._expect(asked.heartbeat)
        self._find(asked)

    def _is_usual(self, seen: Peek, notes: HeadNotes) -> bool:
        """Whether one like it has come before: then it is on its way."""
        usual = recall(notes.usual, seen)
        if usual is None:
            return False
        desk = self._desk
        want = again(usual, desk.catalog.known(seen.model or ""), seen, self._body, desk.rules)
        if want is None:
            return False
        self._asker, self._wanted = usual.asker, want
        self._info.client, self._info.model = usual.asker.client, want.facts.name
        self._expect(usual.heartbeat)
        self._submit(want)
        return True

    def _expect(self, heartbeat: Heartbeat | None) -> None:
        if heartbeat is not None:
            self._heart = Heart(heartbeat, self._client, self._head, self._desk.engine.now())

    def _find(self, asked: Asked) -> None:
        """The model that was asked for, or the next that may stand in for it."""
        if not asked.model:
            self._as_it_is(asked)
            return
        facts = self._desk.catalog.known(asked.model)
        if facts is None:
            self._phase = ASKING
            self._start(self._ask_facts(asked))
        else:
            self._want(asked, facts)

    async def _ask_facts(self, asked: Asked) -> None:
        facts = await self._desk.catalog.facts(asked.model)
        if facts is not None:
            self._want(asked, facts)
        elif asked.instead("model_not_found"):
            self._find(asked)
        elif asked.error is not None:
            self.fail(asked.error)
        else:
            self._as_it_is(asked)

    def _want(self, asked: Asked, facts: ModelFacts) -> None:
        self._info.model = facts.name
        try:
            if asked.unloads():
                self._desk.engine.post(UnloadAsked(facts.blob))
                said = msgspec.json.encode(unloaded(self._path, asked.named, datetime.now(UTC)))
                self.answer(Answer(200, (("Content-Type", "application/json; charset=utf-8"),), said))
                return
            self._wanted = want = asked.wanted(facts)
        except RouterError as error:
            self._refused(error)
            return
        notes = reply_notes(want)
        self._info.notes = {**asked.notes, **notes} if notes else asked.notes
        remember(self._head.notes.usual, asked, want, self._desk.rules)
        self._submit(want)

    def _refused(self, error: RouterError) -> None:
        """This model does not answer; perhaps another may instead."""
        asked = self._asked
        if asked is not None and asked.instead(error.code, error):
            self._attempt = 1
            self._find(asked)
        else:
            self.fail((asked.error if asked is not None else None) or error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._desk.tasks.start(self._guarded(work))

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

    def _submit(self, want: Wanted) -> None:
        engine, seconds = self._desk.engine, self._desk.limits.queue_timeout_seconds
        self._phase = WAITING
        self._lease = number = engine.new_ticket_id()
        ticket = want.ticket(number, self._asker, engine.now(), seconds, self._info.request_id)
        engine.submit(ticket, self._decided)
        if self._phase == WAITING and self._heart is not None and self._heart.waits(ticket.arrived_at):
            self.check(ticket.arrived_at)

    def _decided(self, decision: Grant | Reject) -> None:
        if isinstance(decision, Reject):
            self._lease = None
            self._refused(rejection(decision))
            return
        self._grant = decision
        self._info.granted(decision, self._desk.engine.now())
        if self._wanted is not None:
            self._body = self._wanted.body_for(decision)
        self._connect(decision.url)

    def _as_it_is(self, asked: Asked) -> None:
        """To one instance, without a slot: it answers with words of its own."""
        self._info.notes = {}
        self._body = asked.original
        try:
            self._connect(self._desk.primary().spec.url)
        except RouterError as error:
            self.fail(error)

    def _connect(self, url: str) -> None:
        self._phase = OPENING
        connection = None if self._fresh else self._desk.pool.take(url)
        if connection is not None:
            self._send(connection)
        else:
            self._opening = self._desk.pool.open(url, self._send, self._unreachable)

    def _send(self, connection: UpstreamConnection) -> None:
        self._opening = None
        self._phase = ASKED
        desk, head, body = self._desk, self._head, self._body
        self._reply = reply = ReplyRelay(self, self._client, head, self._path, connection, desk.limits, desk.engine.now)
        if self._heart is not None:
            reply.begun = self._heart.begun
        reply.last = self._attempt == ATTEMPTS
        notes: HeadNotes = head.notes
        begun = notes.begun.get(connection.url) or notes.begin(head, connection.url, desk.pool)
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
        want = self._wanted
        self._give_back(runner_lost=True)
        self._fresh = False
        if want is None or self._attempt == ATTEMPTS:
            self._refused(error)
            return
        log = structlog.get_logger("router.request")
        log.warning("tried again", request_id=self._info.request_id, model=self._info.model, why=str(error))
        self._attempt += 1
        self._submit(want)

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        self._give_back(runner_lost=hangs)
        self._refused(error)

    def reply_broken(self, error: RouterError, *, keep: bool, died: bool) -> None:
        self._info.error_code = error.code
        self._give_back(runner_lost=died)
        self._close_books(self._reply.status if self._reply else 0)
        self._client.answered(keep=keep)

    def reply_done(self, *, reusable: bool, keep: bool, died: bool) -> None:
        reply = self._reply
        assert reply is not None
        if reusable:
            if self._client.write_paused:
                reply.resume()
            self._desk.pool.give_back(reply.connection)
        else:
            reply.connection.abort()
        self._give_back(runner_lost=died)
        self._close_books(reply.status)
        self._client.answered(keep=keep)

    # --- endings ---------------------------------------------------------------------------------------------

    def fail(self, error: RouterError) -> None:
        """Ends with an error in the shape of the API that was called. No byte of a server's answer is out."""
        if self._phase == ENDED:
            return
        self._info.error_code = error.code
        heart = self._heart
        if heart is not None and heart.begun:
            self._close_books(error.status)
            self._client.answered(keep=heart.end(error) and self._client.may_keep())
            return
        reply = error_reply(api_of(self._path), error, self._info.request_id)
        self.answer(Answer(reply.status, reply.headers, reply.body))

    def answer(self, answer: Answer) -> None:
        """Ends with a whole answer of the router's own."""
        headers = (*answer.headers, *self._info.reply_headers(None).items())
        self._close_books(answer.status)
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
            self._desk.engine.cancel(lease)
        self._give_back(runner_lost=False)
        self._close_books(CLIENT_GONE)

    def _give_back(self, *, runner_lost: bool) -> None:
        """The slot, where one is held."""
        lease, reply = self._lease, self._reply
        self._lease = self._grant = None
        if lease is not None:
            tokens, first = (reply.chunks, reply.first_byte_at) if reply is not None else (0, None)  # a chunk a token
            self._desk.engine.release(lease, runner_lost=runner_lost, output_tokens=tokens, first_byte_at=first)

    def _close_books(self, status: int) -> None:
        self._phase = ENDED
        info, reply = self._info, self._reply
        if reply is not None:
            first, last = reply.first_byte_at, reply.last_byte_at
            info.exchange = Record(
                self._desk.engine.now, reply.status, first, last, reply.bytes_out, reply.chunks, reply.tail()
            )
            self._reply = None  # they refer to each other, and what is not in use must be free at once, to be used warm
        self._desk.books.ended(info, self._head.method.decode(), self._path, status)

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
            heart.beat(now, self._info.reply_headers(None), self._desk.engine, self._lease, self._grant)
            if self._reply is not None:
                self._reply.begun = True
        if self._phase == ASKED and self._reply is not None:
            self._reply.check(now)
