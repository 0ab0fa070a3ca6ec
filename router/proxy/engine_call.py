"""How one request is put to a server that is not Ollama: its path, head and body, and what its reply is translated by.

Requests in OpenAI's and Anthropic's APIs pass byte for byte, but for the name of the model and the Content-Type. Those
in Ollama's are translated (`llm_api/translation`). Knows no connection's state, and decides nothing about slots.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

from router.domain.model import ModelFacts
from router.engines.base import EngineTarget
from router.http1.headers import request_lines
from router.http1.parser import RequestHead
from router.llm_api.form_data import find_field, replaced
from router.llm_api.inference_request import DROPPED_OPTIONS_HEADER, InferenceRequest
from router.llm_api.json_edit import set_member
from router.llm_api.translation.reply import ReplyTranslator
from router.llm_api.translation.request import TranslatedRequest, is_translated, translated
from router.proxy.head_cache import HeadFacts
from router.proxy.translated_connection import TranslatedConnection
from router.proxy.upstream_pool import UpstreamConnection

_NOT_PASSED = frozenset((b"content-type", b"content-encoding"))
_NOT_TRANSLATED = _NOT_PASSED | {b"accept", b"accept-encoding"}
_POOLED_BYTES_MAX = 65536
"""After a longer body the connection is not used again: its reply may come before all of it is sent."""


class EngineCall:
    """One request for a model of such a server."""

    def __init__(self, request: InferenceRequest, facts: ModelFacts, head: RequestHead, head_facts: HeadFacts) -> None:
        """
        Raises:
            BadRequest: the request cannot be translated.
        """
        self._request = request
        self.requested_model = request.requested_model
        self.model = facts
        self._head = head
        self._head_facts = head_facts
        self._target = EngineTarget("")
        self._translation: TranslatedRequest | None = None
        path = head_facts.path
        self.is_load_only = request.parsed.is_load_only and path.startswith("/api/")
        """Whether it is answered here, once its model is there."""
        if is_translated(path) and not self.is_load_only:
            self._translation = translated(path, request.body)

    def aim(self, target: EngineTarget) -> bytes:
        """The body for that server."""
        self._target, request = target, self._request
        if self._translation is not None:
            dropped = self._translation.dropped_for(target)
            if dropped:
                request.substitution_headers[DROPPED_OPTIONS_HEADER] = ", ".join(dropped)
            return self._translation.body(target)
        if self._head_facts.is_form:
            place = find_field(request.body, request.content_type, "model")
            return request.body if place is None else replaced(request.body, place, target.name)
        return set_member(request.body, "model", json.dumps(target.name).encode())

    def head(self, authority: bytes, via: tuple[bytes, bytes], body_bytes: int) -> bytes:
        """The request's head for that server."""
        translation, head = self._translation, self._head
        left_out = _NOT_PASSED if translation is None else _NOT_TRANSLATED
        target = head.target if translation is None else translation.path.encode()
        pairs = [pair for pair in head.headers if pair[0].lower() not in left_out]
        kind = b"application/json"
        if self._head_facts.is_form:
            kind = self._request.content_type.encode("latin-1")
        added = (via, (b"Content-Type", kind), *self._target.headers)
        return b"%sContent-Length: %d\r\n\r\n" % (request_lines(b"POST", target, pairs, authority, added), body_bytes)

    def received_by(
        self, connection: UpstreamConnection, body_bytes: int, clock: Callable[[], float]
    ) -> UpstreamConnection:
        """The connection as the reply's receiver has to see it. `clock`: monotonic seconds."""
        translation = self._translation
        if translation is None:
            return connection
        translator = ReplyTranslator(translation.shape, self._request.requested_model, _now, clock)
        is_pooled = body_bytes <= _POOLED_BYTES_MAX
        return TranslatedConnection(connection, translator, wants_stream=translation.streams, is_pooled=is_pooled)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
