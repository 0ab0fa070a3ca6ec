"""One request for a model, from what its client wrote to what a server gets.

Whoever serves inference requests follows these steps:

    request = read_request(rules, path, body, header, identity)   # RouterError: respond with it
    not request.model          -> send `request.original_body` to the primary unchanged: it responds in its own words
    facts = the catalog's for `request.model`
    no facts                   -> `request.try_fallback("model_not_found")`: True: look up the new `request.model`;
                                  False: as without a model
    request.only_unloads()     -> post `UnloadRequested(facts.blob)` and respond with `unload_reply(...)`
    request.plan_for(facts)    # RouterError: respond with it
    submit `request.ticket(...)`
    Reject                     -> `request.try_fallback(code, error)`: True: again from the facts; False: its `error`
    Grant                      -> send `request.body_for(grant)`, and put `request.substitution_headers` on the response

The body is forwarded byte for byte, except for the members that the router controls: `keep_alive` (its own timers
honour it), the placement options `num_gpu` and `main_gpu`, the name of a substituted model, and, for models protected
from reloads, runner options in which the request differs from the replica that serves it.

Pure: it does no I/O and chooses no replica.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from router.domain.actions import Grant
from router.domain.client_identity import ClientIdentity
from router.domain.keep_alive import parse_keep_alive
from router.domain.model import ModelFacts
from router.domain.model_names import canonical, is_cloud
from router.domain.request import RunnerOptions, Ticket, TicketId
from router.engines.ollama.runner_options import PLACEMENT_OPTIONS, RUNNER_OPTIONS, runner_options, written_context
from router.errors import BadRequest, Forbidden, ModelNotFound, RouterError
from router.http1.headers import HeaderLookup
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.form_data import find_field, find_fields, is_form, replaced
from router.llm_api.heartbeat_format import Heartbeat, heartbeat_for
from router.llm_api.json_edit import remove_nested, set_member, set_nested, set_only
from router.llm_api.model_aliases import ANY, REASONS, Substitutes
from router.llm_api.prompt_fingerprint import TOKENS_MIN, fingerprints_of
from router.scheduler.balancing.prefix_affinity import BYTES_PER_TOKEN

MODEL_HEADER = "X-Llamayard-Model"
"""Names the model that answers, where it is not the requested one."""
FALLBACK_HEADER = "X-Llamayard-Fallback"
"""The reason for a fallback, as in the configuration."""
DROPPED_OPTIONS_HEADER = "X-Llamayard-Dropped-Options"


@dataclass(frozen=True, slots=True)
class ModelRules:
    """The operator's rules for models and their names."""

    default_context_length: int
    substitutes: Substitutes = field(default_factory=Substitutes)
    passes: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Canonical name or `ANY` -> whether options are forwarded unchanged (`models.NAME.options: pass`)."""
    cloud: bool = False
    heartbeat_seconds: float | None = None
    removing: Set[str] = frozenset()
    """Models that are being deleted, as `ModelFacts.name`: no request may start with them. A live view."""

    def protects(self, facts: ModelFacts) -> bool:
        """Whether the model is protected from reloads that only a request's options would cause."""
        if not self.passes:
            return True
        return not self.passes.get(canonical(facts.name), self.passes.get(ANY, False))


class RoutingPlan(msgspec.Struct, frozen=True):
    """What the model, path and options of a request require; the same for all requests that share these."""

    facts: ModelFacts
    options: RunnerOptions
    """Effective runner options: the Modelfile's parameters overridden by the request's own; defaults left out."""
    context_length: int
    """Requested tokens of context; 0 where none are requested."""
    keep_alive_seconds: float | None
    """Negative: for ever. None: the request does not say."""
    is_flexible: bool
    """Whether a replica with other runner options may serve; only `/api` bodies can be adapted to it."""
    default_context_length: int


class InferenceRequest(msgspec.Struct):
    """Made by `read_request`, or directly where an equal request has the plan already."""

    path: str
    rules: ModelRules
    client_identity: ClientIdentity
    original_body: bytes
    """As the client sent it."""
    body: bytes
    """As it is forwarded, except for `body_for`."""
    parsed: ParsedBody
    requested_model: str
    """As the client wrote it; "" where none can be read."""
    model: str
    """The model that is to answer: the requested one, an alias's or a fallback."""
    heartbeat: Heartbeat | None = None
    """How the client is kept waiting (`llm_api/heartbeat_format.py`)."""
    plan: RoutingPlan | None = None
    """Set by `plan_for`."""
    content_type: str = ""
    substitution_headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """For the response: what differs from what was requested."""
    error: RouterError | None = None
    """The error of the requested model, where fallbacks were tried."""
    tried_models: tuple[str, ...] = ()

    def only_unloads(self) -> bool:
        """Whether it only asks for its model to be unloaded.

        Raises:
            BadRequest: its `keep_alive` is not a duration.
        """
        return self.parsed.is_load_only and _keep_alive_of(self.parsed) == 0

    def plan_for(self, facts: ModelFacts) -> RoutingPlan:
        """Sets `plan`, and edits `body` accordingly.

        Raises:
            BadRequest: its `keep_alive` is not a duration; in the server's words.
            ModelNotFound: the model is being deleted.
        """
        rules, parsed = self.rules, self.parsed
        if facts.name in rules.removing:
            raise ModelNotFound(f"model '{self.requested_model}' not found: it is being deleted")
        protected = rules.protects(facts)
        options = runner_options(facts, parsed.options, rules.default_context_length)
        keep_alive_seconds = _keep_alive_of(parsed)
        dropped = [name for name in PLACEMENT_OPTIONS if name in parsed.options] if protected else []
        for name in dropped:
            self.body = remove_nested(self.body, "options", name)
        if dropped:
            self.substitution_headers[DROPPED_OPTIONS_HEADER] = ", ".join(dropped)
        else:
            self.substitution_headers.pop(DROPPED_OPTIONS_HEADER, None)
        self._write_context_as_loaded(facts, options)
        if keep_alive_seconds is not None:
            # The server must never unload by itself a model that the router counts on: the timers are the router's.
            set_keep_alive = set_member if parsed.ambiguous else set_only
            self.body = set_keep_alive(self.body, "keep_alive", b"-1")
        self.plan = RoutingPlan(
            facts=facts,
            options=options,
            context_length=_context_length(options),
            keep_alive_seconds=keep_alive_seconds,
            is_flexible=protected and self.path.startswith("/api/"),
            default_context_length=written_context(facts, (), rules.default_context_length),
        )
        return self.plan

    def _write_context_as_loaded(self, facts: ModelFacts, options: RunnerOptions) -> None:
        """Rewrites a `num_ctx` beyond the trained context as the load wrote it: older servers compare the numbers."""
        written = self.parsed.options.get("num_ctx")
        if not isinstance(written, int | float) or isinstance(written, bool):
            return
        context = written_context(facts, options, self.rules.default_context_length)
        if int(written) != context:
            self.body = set_nested(self.body, "options", "num_ctx", str(context).encode())

    @property
    def is_repeatable(self) -> bool:
        """Whether `plan` and `heartbeat` hold for every request whose head, model and `stream` are the same."""
        return (
            self.body is self.original_body
            and not self.substitution_headers
            and is_plain(self.parsed)
            and not (self.rules.substitutes.aliases or self.rules.substitutes.fallbacks)
        )

    def ticket(self, ticket_id: TicketId, now: float, timeout_seconds: float, request_id: str = "") -> Ticket:
        """The ticket that asks for a slot; `plan` must be set."""
        plan, identity, parsed = self.plan, self.client_identity, self.parsed
        assert plan is not None
        prompt_tokens = parsed.prompt_bytes // BYTES_PER_TOKEN
        return Ticket(
            id=ticket_id,
            model=plan.facts,
            options=plan.options,
            context_length=plan.context_length,
            keep_alive_seconds=plan.keep_alive_seconds,
            arrived_at=now,
            deadline=now + timeout_seconds,
            client=identity.client,
            session=identity.session,
            priority=identity.priority,
            prompt_tokens=prompt_tokens,
            output_tokens_max=parsed.output_tokens_max,
            is_flexible=plan.is_flexible,
            layout=identity.layout,
            fingerprints=self.fingerprints if prompt_tokens >= TOKENS_MIN else None,
            request_id=request_id,
        )

    def fingerprints(self) -> tuple[int, ...]:
        """Of the beginning of its prompt."""
        return fingerprints_of(self.path, self.body)

    def body_for(self, grant: Grant) -> bytes:
        """The body with runner options for which the granted replica does not reload."""
        body, plan = self.body, self.plan
        if plan is None or not plan.is_flexible or grant.options == plan.options:
            return body
        requested_options, loaded_options = dict(plan.options), dict(grant.options)
        for name, default in RUNNER_OPTIONS.items():
            if requested_options.get(name) == loaded_options.get(name):
                continue
            value = loaded_options.get(name, plan.default_context_length if name == "num_ctx" else default)
            text = None if value is None else str(value).lower().encode()
            body = remove_nested(body, "options", name) if text is None else set_nested(body, "options", name, text)
        return body

    def try_fallback(self, code: str, error: RouterError | None = None) -> bool:
        """Switches to the next fallback after `model` failed with that stable error code.

        Returns False if there is none; `error` is then that of the requested model, if it had one.
        """
        if len(self.tried_models) == 1 and self.error is None:
            self.error = error
        fallback = self.rules.substitutes.fallback_for(self.requested_model, [*self.tried_models, self.model], code)
        if fallback is None or (is_cloud(fallback) and not self.rules.cloud):
            return False
        self.substitute(fallback)
        self.tried_models += (fallback,)
        self.substitution_headers.setdefault(FALLBACK_HEADER, REASONS[code])
        return True

    def substitute(self, model: str) -> None:
        """Another model is to answer: puts its name into the body and the response's headers."""
        self.model = model
        self.substitution_headers[MODEL_HEADER] = model
        if is_form(self.content_type):
            place = find_field(self.original_body, self.content_type, "model")
            self.body = self.original_body if place is None else replaced(self.original_body, place, model)
        else:
            self.body = set_member(self.original_body, "model", json.dumps(model).encode())


def read_request(
    rules: ModelRules,
    path: str,
    body: bytes,
    header: HeaderLookup,
    client_identity: ClientIdentity,
    parsed: ParsedBody | None = None,
) -> InferenceRequest:
    """Reads a request and resolves an alias. `parsed`: the body, where the caller has parsed it.

    Raises:
        RouterError: the body cannot be read or names different models, or the model is a cloud model and those are
            disabled.
    """
    content_type = header("content-type") or ""
    parsed = parsed or _parse(path, content_type, body)
    refuse_conflict(parsed)
    model = (parsed.model or "") if not parsed.unreadable else ""
    request = InferenceRequest(
        path=path,
        rules=rules,
        client_identity=client_identity,
        original_body=body,
        body=body,
        parsed=parsed,
        requested_model=model,
        model=model,
        content_type=content_type,
        tried_models=(model,),
    )
    if not model:
        return request
    if not _only_unloads(request):  # otherwise the response is immediate
        request.heartbeat = heartbeat_for(path, parsed, header, rules.heartbeat_seconds)
    target = rules.substitutes.target(model)
    if target is not None:
        request.substitute(target)
    refuse_cloud(request.model, cloud=rules.cloud)
    return request


def is_plain(parsed: ParsedBody) -> bool:
    """Whether the body says nothing that affects routing but its model, `stream` and the prompt's size."""
    return not (
        parsed.options or parsed.is_load_only or parsed.ambiguous or parsed.unreadable or parsed.keep_alive is not None
    )


def refuse_conflict(parsed: ParsedBody) -> None:
    """
    Raises:
        BadRequest: the body names different models in one field.
    """
    if parsed.conflict:
        raise BadRequest(
            f"the body has the field {parsed.conflict!r} more than once, with different values; names of fields are "
            "compared without regard to case"
        )


def refuse_cloud(model: str, *, cloud: bool) -> None:
    """
    Raises:
        Forbidden: a model of ollama.com, unless `cloud` allows those.
    """
    if not cloud and is_cloud(model):
        raise Forbidden(
            f"ollama cloud is disabled: {model!r} would run on ollama.com with the server's own account (ollama.cloud)"
        )


def unload_reply(path: str, model: str, now: datetime) -> dict[str, object]:
    """An Ollama server's reply to a request that unloads, whether the model is loaded, busy or neither.

    The router gives it itself, because a server that was asked would unload without the router's knowledge.
    """
    if path == "/api/embed":
        return {"model": model, "embeddings": []}
    if path == "/api/embeddings":
        return {"embedding": []}
    created_at = now.isoformat().replace("+00:00", "Z")
    content = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
    return {"model": model, "created_at": created_at, **content, "done": True, "done_reason": "unload"}


def _parse(path: str, content_type: str, body: bytes) -> ParsedBody:
    """Parses a body; of a form only the model.

    Raises:
        BadRequest: it has too many parts to be parsed within bounds.
    """
    if not is_form(content_type):
        return parse_body(body, path)
    fields = find_fields(body, content_type, "model")
    models = [body[field.start : field.end].decode(errors="replace") for field in fields]
    conflict = "model" if len(set(models)) > 1 else ""
    return ParsedBody(model=models[0] if models else "", conflict=conflict, unreadable=not models)


def _only_unloads(request: InferenceRequest) -> bool:
    try:
        return request.only_unloads()
    except BadRequest:
        return False


def _keep_alive_of(parsed: ParsedBody) -> float | None:
    """Seconds, negative for ever, None where the request does not say.

    Raises:
        BadRequest: the server would refuse it; in its words.
    """
    try:
        return parse_keep_alive(parsed.keep_alive, plain_seconds=False)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def _context_length(options: RunnerOptions) -> int:
    requested = dict(options).get("num_ctx")
    return int(requested) if requested is not None else 0
