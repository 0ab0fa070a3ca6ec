"""A request with a long body: sent on while it still comes, where that cannot be wrong.

When the first pieces name the model and a copy of it has a free slot, that slot is taken and the pieces go on as they
come, all but the last. Nothing that a server could begin to work on has then left: it reads a body to the end of its
one JSON value, and that is in the piece that is held. When the body has come whole it is read as Go reads it. If that
gives the same model and nothing else that the router must heed, the rest is sent; if it gives anything else (another
`model` further back, runner options, a `keep_alive` to be replaced), the server's connection is cut, the slot given
back, and the request goes the ordinary way. So does one whose body takes longer than `Patience.slot_seconds`, and one
whose server fails meanwhile. The pieces are kept until the reply begins.
"""

from __future__ import annotations

from router.domain.actions import Grant, Reject
from router.errors import InstanceLost, RouterError
from router.http1.headers import request_head
from router.http1.parser import RequestHead
from router.llm_api.body_reader import ParsedBody
from router.llm_api.inference_request import InferenceRequest
from router.observability.request_record import RequestRecord
from router.proxy.context import ProxyContext
from router.proxy.exchange import ASKED, ASKING, WAITING, ProxyExchange
from router.proxy.interfaces import Requester
from router.proxy.request_body import RequestBodyReader
from router.proxy.response_stream import ResponseStream
from router.proxy.upstream_pool import UpstreamConnection


class StreamingUpload(ProxyExchange):
    """As the ordinary exchange, but told of the pieces of its body as they come."""

    def __init__(
        self,
        context: ProxyContext,
        client: Requester,
        head: RequestHead,
        path: str,
        info: RequestRecord,
        intake: RequestBodyReader,
    ) -> None:
        super().__init__(context, client, head, path, info)
        self._intake = intake
        self._tried = False
        self._early = False
        """Whether the request goes on although its body has not been read as a whole."""
        self._whole = False
        self._written = 0
        """How many of the pieces have gone to the server."""
        self._gives_up_at = float("inf")

    # --- while the body comes --------------------------------------------------------------------------------

    def more(self) -> None:
        """Another piece has come, and it is not the last."""
        if not self._tried:
            model = self._intake.model()
            self._tried = model is not None or self._intake.count > 1
            if model is not None:
                self._begin_early(model)
        elif self._early and self._reply is not None:
            self._write(self._reply, len(self._intake.pieces) - 1)

    def _begin_early(self, model: str) -> None:
        """Takes a slot if there is one at once; whatever is not plain is left for when the body is there."""
        context, head, info = self._context, self._head, self._info
        facts = context.catalog.known(model)
        if facts is None or head.notes.is_young or not context.has_free_slot(facts):
            return
        try:
            request = InferenceRequest(
                context.rules, self._path, b"{}", head.text, info.client, context.gpus, ParsedBody(model=model)
            )
            routing = request.routing(facts)
        except RouterError:
            return
        if request.notes or routing.options:
            return
        self._early = self._intake.holds_still = True
        self._asked = request
        self._client_identity = request.client_identity
        info.model = facts.name
        self._gives_up_at = context.controller.now() + context.timeouts.slot_seconds
        self._submit(routing)
        if self._phase == WAITING and self._lease is not None:
            lease, self._lease = self._lease, None
            context.controller.cancel(lease)
            self._undo(runner_lost=False)

    def _decided(self, decision: Grant | Reject) -> None:
        if not self._early or self._whole:
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
        self._phase = ASKED
        context, head, intake = self._context, self._head, self._intake
        self._reply = reply = ResponseStream(
            self, self._client, head, self._path, connection, context.limits, context.controller.now
        )
        reply.request_sent = False
        host = context.pool.authority(connection.url)
        connection.transport.write(request_head(head.method, head.target, head.headers, host, intake.length))
        self._written = 0
        self._write(reply, len(intake.pieces) - (not self._whole))

    def _write(self, reply: ResponseStream, until: int) -> None:
        pieces = self._intake.pieces
        for piece in pieces[self._written : until]:
            reply.connection.transport.write(piece)
        self._written = max(self._written, until)
        if self._whole:
            reply.sent()

    def request_blocked(self, *, blocked: bool) -> None:
        self._client.body_blocked(blocked=blocked)

    # --- when it has come ------------------------------------------------------------------------------------

    def begin(self, body: bytes) -> None:
        """The whole body has come: it is in the intake."""
        del body
        self._whole = True
        self._client.body_blocked(blocked=False)
        self._gives_up_at = float("inf")
        try:
            seen = self._intake.seen(self._path)
        except RouterError as error:
            self._undo(runner_lost=False)
            self.fail(error)
            return
        if self._early:
            plain = seen.model == (self._asked.model if self._asked else None) and not seen.options
            if plain and seen.keep_alive is None and not seen.unreadable:
                if self._reply is not None:
                    self._write(self._reply, len(self._intake.pieces))
                return
            if self._reply is not None and self._reply.has_begun:
                return  # it answered without the rest, which it does not get
            self._undo(runner_lost=False)
        self._seen = seen
        super().begin(self._intake.joined())

    # --- when it goes wrong ----------------------------------------------------------------------------------

    def _undo(self, *, runner_lost: bool) -> None:
        """As if nothing had been asked for yet."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._reply is not None:
            self._reply.cancel()
            self._reply = None
        self._give_back(runner_lost=runner_lost)
        self._early = self._intake.holds_still = False
        self._asked = None
        self._phase = ASKING
        self._gives_up_at = float("inf")
        self._client.body_blocked(blocked=False)

    def reply_begins(self) -> None:
        super().reply_begins()
        self._gives_up_at = float("inf")
        if self._whole:
            self._intake.forget()

    def reply_lost(self, error: InstanceLost, *, stale: bool) -> None:
        if not self._early:
            super().reply_lost(error, stale=stale)
            return
        self._reply = None
        self._undo(runner_lost=not stale)
        self._attempt += not stale
        if self._whole:
            self.begin(b"")

    def reply_failed(self, error: RouterError, *, hangs: bool = False) -> None:
        self._asked = None if self._early else self._asked
        super().reply_failed(error, hangs=hangs)

    def check(self, now: float) -> None:
        if now >= self._gives_up_at:
            self._undo(runner_lost=False)
        super().check(now)
