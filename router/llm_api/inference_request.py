"""One request for a model, from what its client wrote to what goes to a server: the steps that every way in shares.

Whoever answers leased requests does this with it, in this order:

    asked = Asked(rules, path, body, header, address, GPUs)      # RouterError: answer it
    not asked.model            -> send `asked.original` to the primary as it is: it answers in its own words
    facts = the catalog's for `asked.model`
    none of it                 -> `asked.instead("model_not_found")`: true: look the new `asked.model` up; else as above
    asked.unloads()            -> post `UnloadAsked(facts.blob)` and answer `wanted.unloaded(path, asked.named, …)`
    want = asked.routing(facts) # RouterError: answer it
    submit `want.ticket(number, asked.asker, …)`
    Reject                     -> `asked.instead(code, error)`: true: again from the facts; else answer `asked.error`
    Grant                      -> send `want.body_for(grant)`; put `asked.notes` and `reply_notes(want)` on the reply

`asked.heartbeat` says how a client is kept waiting meanwhile (`llm_api/heartbeat_format.py`). It asks nobody and
decides no place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from router.admission.client_identity import ClientIdentity, Header, identify_client
from router.domain.gpu import Gpu, GpuUuid
from router.domain.model import ModelFacts
from router.domain.model_names import canonical, is_cloud
from router.errors import BadRequest, Forbidden, ModelNotFound, RouterError
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.form_data import find_field, is_form, replaced
from router.llm_api.heartbeat_format import Heartbeat, heartbeat_for
from router.llm_api.json_edit import set_member
from router.llm_api.model_aliases import ANY, REASONS, Substitutes
from router.llm_api.routing_request import RoutingRequest, build_routing_request, keep_alive_of

MODEL_HEADER = "X-Llamayard-Model"
"""Names the model that answers where it is not the one that was asked for."""
FALLBACK_HEADER = "X-Llamayard-Fallback"
"""Why another model answers: the reason as in the configuration."""


@dataclass(frozen=True, slots=True)
class ModelRules:
    """What the operator has said of models and their names."""

    default_context_length: int
    substitutes: Substitutes = field(default_factory=Substitutes)
    passes: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Canonical name or `ANY` -> whether options go on unchanged (`models.NAME.options: pass`)."""
    cloud: bool = False
    heartbeat_seconds: float | None = None
    removing: Set[str] = frozenset()
    """Models that are being deleted, as `ModelFacts.name`: nothing begins with them any more. A live view."""

    def protects(self, facts: ModelFacts) -> bool:
        if not self.passes:
            return True
        return not self.passes.get(canonical(facts.name), self.passes.get(ANY, False))


class InferenceRequest:
    """Grows by `instead`; all else is as the client wrote it."""

    __slots__ = (
        "_content_type", "_path", "_reason", "_rules", "_tried", "body", "client_identity", "error", "heartbeat",
        "model",
        "named", "notes", "original", "seen",
    )  # fmt: skip

    def __init__(
        self,
        rules: ModelRules,
        path: str,
        body: bytes,
        header: Header,
        address: str,
        gpus: Callable[[], Mapping[GpuUuid, Gpu]],
        seen: ParsedBody | None = None,
        client_identity: ClientIdentity | None = None,
    ) -> None:
        """`seen`, `asker`: what is known already of the body and the head. `header` takes names in lower case.

        Raises:
            RouterError: the body or a header of the router's own cannot be read, or a cloud model is not let through.
        """
        self._rules = rules
        self._path = path
        self._content_type = header("content-type") or ""
        self.original = self.body = body
        self.seen = seen or read(path, self._content_type, body)
        self.client_identity: ClientIdentity = client_identity or identify_client(header, address, gpus)
        self.named = (self.seen.model or "") if not self.seen.unreadable else ""
        """The model as the client wrote it; "" where none can be read."""
        self.model = self.named
        """The model that is to answer, as it stands in `body`."""
        self.notes: dict[str, str] = {}
        self.error: RouterError | None = None
        """What became of the model that was asked for, where another was tried."""
        self.heartbeat: Heartbeat | None = None
        self._tried = [self.model]
        if not self.model:
            return
        if not self._only_unloads():  # that is answered at once
            self.heartbeat = heartbeat_for(path, self.seen, header, rules.heartbeat_seconds)
        target = rules.substitutes.target(self.model)
        if target is not None:
            self._become(target)
        refuse_cloud(self.model, cloud=rules.cloud)

    def _only_unloads(self) -> bool:
        try:
            return self.unloads()
        except BadRequest:
            return False

    def unloads(self) -> bool:
        """Whether it only asks for its model to be unloaded.

        Raises:
            BadRequest: its `keep_alive` is no duration.
        """
        return self.seen.is_load_only and keep_alive_of(self.seen) == 0

    def routing(self, facts: ModelFacts) -> RoutingRequest:
        """What it wants of the fleet.

        Raises:
            BadRequest: its `keep_alive` is no duration.
            ModelNotFound: the model is being deleted.
        """
        rules = self._rules
        if facts.name in rules.removing:
            raise ModelNotFound(f"model '{self.named}' not found: it is being deleted")
        return build_routing_request(
            self._path, self.seen, facts, self.body, rules.default_context_length, protect=rules.protects(facts)
        )

    def instead(self, code: str, error: RouterError | None = None) -> bool:
        """Turns to the next model that may answer instead, after an error with that stable code.

        False where there is none; `error` then is that of the model that was asked for, if it had one.
        """
        if len(self._tried) == 1 and self.error is None:
            self.error = error
        other = self._rules.substitutes.instead_of(self.named, [*self._tried, self.model], code)
        if other is None or (is_cloud(other) and not self._rules.cloud):
            return False
        self._become(other)
        self._tried.append(other)
        self.notes.setdefault(FALLBACK_HEADER, REASONS[code])
        return True

    def _become(self, model: str) -> None:
        self.model = model
        self.notes[MODEL_HEADER] = model
        if is_form(self._content_type):
            place = find_field(self.original, self._content_type, "model")
            self.body = self.original if place is None else replaced(self.original, place, model)
        else:
            self.body = set_member(self.original, "model", json.dumps(model).encode())


def read(path: str, content_type: str, body: bytes) -> ParsedBody:
    """What a body says; of a form only its model is read.

    Raises:
        BadRequest: it has too many parts to be looked at within bounds.
    """
    if not is_form(content_type):
        return parse_body(body, path)
    place = find_field(body, content_type, "model")
    model = "" if place is None else body[place.start : place.end].decode(errors="replace")
    return ParsedBody(model=model, unreadable=place is None)


def refuse_cloud(model: str, *, cloud: bool) -> None:
    """Forbidden for a model of ollama.com, unless those are let through."""
    if not cloud and is_cloud(model):
        raise Forbidden(
            f"ollama cloud is disabled: {model!r} would run on ollama.com with the server's own account (ollama.cloud)"
        )
