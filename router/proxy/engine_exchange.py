"""Exchanges of a router that also has servers other than Ollama: a request for one of their models is put to them.

Where a request is for Ollama's, everything is as in `exchange.py`. A router without other servers does not use these
classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from router.domain.actions import Grant, Reject
from router.domain.events import UnloadRequested
from router.domain.health import ReplyFailure
from router.domain.instance import InstanceView
from router.domain.model import ModelFacts
from router.engines.ollama.rules import KIND as OLLAMA
from router.engines.openai.servers import OPTIONAL_PATHS
from router.errors import RouterError
from router.http1.response_writer import LocalResponse
from router.llm_api.body_reader import parse_body
from router.llm_api.errors import JSON
from router.llm_api.inference_request import InferenceRequest, unload_reply
from router.llm_api.json_skimmer import Beginning
from router.proxy.engine_call import EngineCall
from router.proxy.exchange import RESOLVING, ProxyExchange
from router.proxy.streaming_upload import StreamingUpload
from router.proxy.upstream_pool import UpstreamConnection


class EngineExchange(ProxyExchange):
    """As `ProxyExchange`, for models of any engine."""

    _call: EngineCall | None = None
    """How the server is asked, where that is not Ollama; until its reply begins."""
    _is_elsewhere = False
    """Whether that server is not Ollama."""

    # --- what it asks for ------------------------------------------------------------------------------------

    async def _query_support(self, view: InstanceView | None) -> None:
        """Only Ollama servers are asked beforehand, whatever their models."""
        if not self._facts.is_form:
            self._parsed = self._parsed or parse_body(self._body, self._facts.path)
            if self._engine_model(self._parsed.model or "") is not None:
                self._resolve()
                return
        await super()._query_support(view)

    def _engine_model(self, name: str) -> ModelFacts | None:
        """The model of another server that the name, or the alias, means."""
        engines = self._context.engines
        assert engines is not None
        return engines.known(self._context.rules.substitutes.target(name) or name) if name else None

    def _plan(self, request: InferenceRequest, facts: ModelFacts) -> None:
        self._call, self._is_elsewhere = None, facts.engine != OLLAMA
        if facts.engine == OLLAMA:
            super()._plan(request, facts)
            return
        self._record.model = facts.name
        path = self._facts.path
        try:
            if request.only_unloads():
                if facts.is_shared:  # not on a server of somebody else
                    self._context.controller.post(UnloadRequested(facts.blob))
                self._answer(unload_reply(path, request.requested_model, datetime.now(UTC)))
                return
            request.plan_elsewhere(facts)
            self._call = EngineCall(request, facts, self._head, self._facts)
        except RouterError as error:
            self._refuse(error)
            return
        if path in OPTIONAL_PATHS:
            self._phase = RESOLVING
            self._start(self._submit_if_supported(request, facts))
        else:
            self._submit(request)

    async def _submit_if_supported(self, request: InferenceRequest, facts: ModelFacts) -> None:
        engines = self._context.engines
        assert engines is not None
        try:
            await engines.refuse_missing(facts, self._facts.path)
        except RouterError as error:
            self._refuse(error)
            return
        self._submit(request)

    def _answer(self, reply: dict[str, object]) -> None:
        body, sender = msgspec.json.encode(reply), self._heartbeat_sender
        if sender is not None and sender.head_sent:
            self._finish(200)
            self._client.response_ended(keep=sender.finish(body) and self._client.may_keep())
        else:
            self.respond(LocalResponse(200, (("Content-Type", JSON),), body))

    # --- to the server ---------------------------------------------------------------------------------------

    def _decided(self, decision: Grant | Reject) -> None:
        call, engines = self._call, self._context.engines
        if call is None or engines is None or isinstance(decision, Reject):
            super()._decided(decision)
            return
        self._grant = decision
        self._record.instance = decision.instance
        self._record.granted_at = self._context.controller.now()
        if call.is_load_only:
            path, model = self._facts.path, call.requested_model
            self._answer(unload_reply(path, model, datetime.now(UTC), "load"))
            return
        self._body = call.aim(engines.target(decision.instance, call.model))
        self._connect(decision.url)

    def _send(self, connection: UpstreamConnection) -> None:
        if self._call is not None:
            connection = self._call.received_by(connection, len(self._body), self._context.controller.now)
        super()._send(connection)

    def _head_for(self, url: str, body_bytes: int) -> bytes:
        if self._call is None:
            return super()._head_for(url, body_bytes)
        return self._call.head(self._context.pool.authority(url), self._context.via.header(), body_bytes)

    def response_begins(self) -> Mapping[str, str]:
        self._call = None  # it holds the request's body
        return super().response_begins()

    # --- endings ---------------------------------------------------------------------------------------------

    def _finish(
        self,
        status: int,
        *,
        runner_lost: bool = False,
        silent_seconds: float = 0.0,
        failure: ReplyFailure | None = None,
    ) -> None:
        reply = self._reply
        if self._is_elsewhere and failure is None and reply is not None and reply.error_code:
            failure = ReplyFailure.ERROR  # an error within a stream that the server ended as it should
        super()._finish(status, runner_lost=runner_lost, silent_seconds=silent_seconds, failure=failure)


class EngineUpload(EngineExchange, StreamingUpload):
    """As `StreamingUpload`; a long body for a server that is not Ollama is sent once it is complete."""

    def _begin_early(self, beginning: Beginning) -> None:
        if self._engine_model(beginning.parsed.model or "") is None:
            super()._begin_early(beginning)
