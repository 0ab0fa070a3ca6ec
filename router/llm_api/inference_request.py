"""One request for a model, from what its client wrote to what a server gets.

Whoever serves inference requests follows these steps:

    request = read_request(rules, path, body, header, identity)   # RouterError: respond with it
    not request.model          -> send `request.original_body` to the primary unchanged: it responds in its own words
    facts = the catalog's for `request.model`
    no facts                   -> `request.try_fallback("model_not_found")`: True: look up the new `request.model`;
                                  False: as without a model
    request.only_unloads()     -> post `UnloadRequested(facts.blob)` and respond with `unload_reply(...)`
    request.refused_option()   -> send `request.body` to a server without a slot: it refuses it before it loads
    request.plan_for(facts)    # RouterError: respond with it
    submit `request.ticket(...)`
    Reject                     -> `request.keep_context(code)`: True: submit the ticket again;
                                  `request.try_fallback(code, error)`: True: again from the facts; False: its `error`
    Grant                      -> send `request.body_for(grant)`, and put `request.substitution_headers` on the response

The body is forwarded byte for byte, except for the members that the router controls: `keep_alive` (its own timers
honour it), the placement options `num_gpu` and `main_gpu`, the name of a substituted model, and, for models protected
from reloads, runner options in which the request differs from the replica that serves it.

Pure: it does no I/O and chooses no replica.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from datetime import datetime

import msgspec

from router.domain.access_key import AccessKey
from router.domain.actions import Grant
from router.domain.client_identity import ClientIdentity
from router.domain.keep_alive import parse_keep_alive
from router.domain.model import ModelFacts
from router.domain.model_names import ANY_MODEL, canonical, is_cloud
from router.domain.request import RunnerOptions, Ticket, TicketId
from router.engines.ollama.runner_options import (
    PLACEMENT_OPTIONS,
    RUNNER_OPTIONS,
    refused_option,
    requested_context,
    runner_options,
    sets_context,
    stored_number,
    written_context,
)
from router.errors import BadRequest, Forbidden, ModelNotFound, RouterError
from router.http1.headers import HeaderLookup
from router.llm_api.body_reader import ParsedBody, longest_text, parse_body
from router.llm_api.form_data import find_field, find_fields, is_form, replaced
from router.llm_api.heartbeat_format import Heartbeat, heartbeat_for
from router.llm_api.json_edit import remove_nested, set_member, set_nested
from router.llm_api.model_aliases import REASONS, Substitutes
from router.llm_api.prompt_fingerprint import TOKENS_MIN, fingerprints_of
from router.scheduler.balancing.prefix_affinity import BYTES_PER_TOKEN

MODEL_HEADER = "X-Llamayard-Model"
"""Names the model that answers, where it is not the requested one."""
FALLBACK_HEADER = "X-Llamayard-Fallback"
"""The reason for a fallback, as in the configuration."""
DROPPED_OPTIONS_HEADER = "X-Llamayard-Dropped-Options"
CONTEXT_HEADER = "X-Llamayard-Context"
"""The context in tokens that a prompt gets which is probably longer: the server drops its beginning."""

KEEP_ALIVE = b"-1"
"""The `keep_alive` that a server gets, in JSON: it must never unload by itself a model that the router counts on. The
timers are the router's."""
_GENERATING = frozenset(
    ("/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
)
_TRUNCATING = frozenset(("/api/embed", "/api/embeddings"))
"""Where a text that is longer than the context is cut to it, so that the context changes the answer."""
_NO_LIMIT = 1 << 62
_KEPT_BYTES_MAX = 1 << 20
"""The original of a longer body is not kept once it is edited."""
_TEXT_BYTES_PER_TOKEN = 10 / 3
"""Of a prompt's JSON, so that a prompt is rather taken to be longer than it is: English prose has 4 to 5, source 3."""
_OUTPUT_TOKENS = 1024
"""Expected at most, whatever a request allows: many allow as much as the model can."""
_USUAL_OUTPUT_TOKENS = 256
"""Expected of a request that does not limit its output."""
_SPECIAL_TOKENS = 8
"""A token is at least a byte of text, except for these, which a tokenizer adds at both ends."""
_KEEPS_CONTEXT: Set[str] = frozenset(("queue_full", "wait_timeout", "shutting_down"))
"""Rejections that a smaller context would not change."""


@dataclass(slots=True)
class ModelRules:
    """The operator's rules for models and their names. One value for the whole router; only a reload changes it."""

    default_context_length: int
    substitutes: Substitutes = field(default_factory=Substitutes)
    passes: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Canonical name or `ANY_MODEL` -> whether options are forwarded unchanged (`models.NAME.options: pass`)."""
    context_lengths: Mapping[str, int] = field(default_factory=dict[str, int])
    """Canonical name -> the context that the model is pinned to (`models.NAME.context_length`)."""
    context_length_max: int | None = None
    """A prompt does not raise the context beyond this; None: the trained context."""
    cloud: bool = False
    heartbeat_seconds: float | None = None
    removing: Set[str] = frozenset()
    """Models that are being deleted, as `ModelFacts.name`: no request may start with them. A live view."""
    version: int = 0
    """Grows with each reload: what was derived from other rules is not used any more."""

    def become(self, other: ModelRules) -> None:
        """Takes over the values of `other`, for everybody who holds these rules."""
        version = self.version + 1
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))
        self.version = version

    def protects(self, facts: ModelFacts) -> bool:
        """Whether the model is protected from reloads that only a request's options would cause."""
        if not self.passes:
            return True
        return not self.passes.get(canonical(facts.name), self.passes.get(ANY_MODEL, False))


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
    takes_default_context: bool = False
    """As `Ticket.takes_default_context`."""
    prompt_bytes_max: int = _NO_LIMIT
    """A longer prompt is probably longer than the context that it gets by default. No limit where the request names
    its context, or where nothing is generated."""
    raised_context_max: int = 0
    """Up to here a long prompt raises its context; 0 where it does not."""


class InferenceRequest(msgspec.Struct):
    """Made by `read_request`, or directly where an equal request has the plan already."""

    path: str
    rules: ModelRules
    client_identity: ClientIdentity
    original_body: bytes
    """As the client sent it; of a long body that was edited, the edited one, so that memory holds it once."""
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
    keeps_context: bool = False
    """Whether a long prompt is served with the default context all the same."""
    has_keep_alive: bool = False
    """Whether `original_body` has the router's `keep_alive` already."""
    is_adapted: bool = False
    """Whether `body` differs from what the client sent in more than `keep_alive`."""

    def only_unloads(self) -> bool:
        """Whether it only asks for its model to be unloaded.

        Raises:
            BadRequest: its `keep_alive` is not a duration.
            Forbidden: its key may not unload models.
        """
        if not (self.parsed.is_load_only and _keep_alive_of(self.parsed) == 0):
            return False
        key = self.client_identity.key
        if key is not None and not key.may_unload:
            raise Forbidden(f"keep_alive: key '{key.name}' may not unload models (keep_alive_seconds_min)")
        return True

    def refused_option(self) -> str | None:
        """The server's message about a runner option whose type it refuses; None where it accepts all of them.

        The placement options are checked like the others: a request that is refused must not succeed because the
        router drops the option, or because a loaded replica has another value.
        """
        options = self.parsed.options
        return refused_option(options) if options else None

    def plan_for(self, facts: ModelFacts) -> RoutingPlan:
        """Sets `plan`, and edits `body` accordingly.

        Raises:
            BadRequest: its `keep_alive` is not a duration; in the server's words.
            Forbidden: its key does not allow the context that it names.
            ModelNotFound: the model is being deleted.
        """
        rules, parsed = self.rules, self.parsed
        if facts.name in rules.removing:
            raise ModelNotFound(f"model '{self.requested_model}' not found: it is being deleted")
        protected = rules.protects(facts)
        self._check_context()
        options = runner_options(facts, parsed.options, rules.default_context_length)
        key, keep_alive_seconds = self.client_identity.key, _keep_alive_of(parsed)
        if key is not None:
            keep_alive_seconds = key.bounded_keep_alive(keep_alive_seconds)
        dropped = [name for name in PLACEMENT_OPTIONS if name in parsed.options] if protected else []
        for name in dropped:
            self.body = remove_nested(self.body, "options", name)
        if dropped:
            self.substitution_headers[DROPPED_OPTIONS_HEADER] = ", ".join(dropped)
        else:
            self.substitution_headers.pop(DROPPED_OPTIONS_HEADER, None)
        self._write_context_as_loaded(facts, options)
        self.is_adapted = self.body is not self.original_body
        if keep_alive_seconds is not None and not self.has_keep_alive:
            self.body = set_member(self.body, "keep_alive", KEEP_ALIVE)
        if len(self.body) > _KEPT_BYTES_MAX:
            self.original_body = self.body  # the same edits, made again for a fallback, change nothing
        is_ollama = self.path.startswith("/api/")
        prompt_bytes_max, raised_context_max = self._context_limits(facts, options, protected)
        self.keeps_context = False
        self.plan = RoutingPlan(
            facts=facts,
            options=options,
            context_length=max(0, requested_context(options) or 0),
            keep_alive_seconds=keep_alive_seconds,
            is_flexible=protected and is_ollama and not self._is_truncated(facts),
            default_context_length=written_context(facts, (), rules.default_context_length),
            takes_default_context=not is_ollama and not sets_context(facts),
            prompt_bytes_max=prompt_bytes_max,
            raised_context_max=raised_context_max,
        )
        return self.plan

    def plan_elsewhere(self, facts: ModelFacts) -> RoutingPlan:
        """Sets `plan` for a model of a server that is not Ollama: no option of a request makes such a server reload.

        Raises:
            BadRequest: its `keep_alive` is not a duration; in Ollama's words.
            Forbidden: its key does not allow the context that it names.
        """
        self._check_context()
        key, keep_alive_seconds = self.client_identity.key, _keep_alive_of(self.parsed)
        if key is not None:
            keep_alive_seconds = key.bounded_keep_alive(keep_alive_seconds)
        self.plan = RoutingPlan(
            facts=facts,
            options=(),
            context_length=0,
            keep_alive_seconds=keep_alive_seconds if facts.is_shared else -1.0,
            is_flexible=False,
            default_context_length=facts.context_length,
        )
        return self.plan

    def _write_context_as_loaded(self, facts: ModelFacts, options: RunnerOptions) -> None:
        """Rewrites a `num_ctx` beyond the trained context as the load wrote it: older servers compare the numbers."""
        written = self.parsed.options.get("num_ctx")
        if not isinstance(written, int | float) or isinstance(written, bool):
            return
        context = written_context(facts, options, self.rules.default_context_length)
        if stored_number(written) != context:
            self.body = set_nested(self.body, "options", "num_ctx", str(context).encode())

    def _context_limits(self, facts: ModelFacts, options: RunnerOptions, protected: bool) -> tuple[int, int]:
        """`prompt_bytes_max` and `raised_context_max` of the plan."""
        rules = self.rules
        if self.path not in _GENERATING or "num_ctx" in self.parsed.options:
            return _NO_LIMIT, 0
        pinned = rules.context_lengths.get(canonical(facts.name)) if rules.context_lengths else None
        context = pinned or requested_context(options) or rules.default_context_length
        trained, key = facts.context_length or context, self.client_identity.key
        bounds = (rules.context_length_max, None if key is None else key.context_length_max)
        most = min([trained, *(bound for bound in bounds if bound is not None)])
        is_fixed = pinned is not None or sets_context(facts) or not protected or most <= context
        return int(min(context, trained) * _TEXT_BYTES_PER_TOKEN), 0 if is_fixed else most

    def _check_context(self) -> None:
        """
        Raises:
            Forbidden: it names a larger context than its key allows.
        """
        key, asked = self.client_identity.key, self.parsed.options.get("num_ctx")
        if key is None or key.context_length_max is None or not isinstance(asked, int | float):
            return
        if asked > key.context_length_max:
            raise Forbidden(
                f"options.num_ctx: key '{key.name}' may use at most {key.context_length_max} tokens of context, "
                f"not {asked:g}"
            )

    def _is_truncated(self, facts: ModelFacts) -> bool:
        """Whether a text to be embedded might be longer than the context that the request itself names.

        A replica with a larger context would then give another answer; without truncation (`truncate: false`) the
        server refuses such a text, which another replica would not.
        """
        written = self.parsed.options.get("num_ctx")
        if self.path not in _TRUNCATING or not isinstance(written, int | float):
            return False
        context = stored_number(written)
        if 0 < facts.context_length <= context or self.parsed.prompt_bytes + _SPECIAL_TOKENS <= context:
            return False
        return longest_text(self.body, "input" if self.path == "/api/embed" else "prompt") + _SPECIAL_TOKENS > context

    def _raised_context(self, plan: RoutingPlan) -> int:
        """The context that holds a long prompt and what is expected of its output; 0 where it is not raised."""
        tokens = int(self.parsed.prompt_bytes / _TEXT_BYTES_PER_TOKEN)
        output_tokens = self.parsed.output_tokens_max
        if output_tokens is None or not 0 <= output_tokens < _OUTPUT_TOKENS:
            output_tokens = _OUTPUT_TOKENS
        context = plan.default_context_length
        while context < tokens + output_tokens:
            context *= 2
        return min(context, plan.raised_context_max)

    def keep_context(self, code: str) -> bool:
        """Gives up a raised context after the request was rejected with that stable error code.

        Returns False where it had none, or where a smaller context would not help.
        """
        if self.keeps_context or code in _KEEPS_CONTEXT or not self.raises_context:
            return False
        self.keeps_context = True
        return True

    @property
    def raises_context(self) -> bool:
        """Whether its prompt raises the context that it asks for."""
        plan = self.plan
        return (
            plan is not None
            and plan.raised_context_max > 0
            and self.parsed.prompt_bytes > plan.prompt_bytes_max
            and not self.keeps_context
        )

    def note_context(self, context_length: int) -> bool:
        """Puts the granted context into the response's headers if it is probably too small for the prompt.

        Returns whether it did.
        """
        plan = self.plan
        is_short = (
            plan is not None
            and self.parsed.prompt_bytes > plan.prompt_bytes_max
            and 0 < context_length < self.parsed.prompt_bytes / _TEXT_BYTES_PER_TOKEN
        )
        if is_short:
            self.substitution_headers[CONTEXT_HEADER] = str(context_length)
        else:
            self.substitution_headers.pop(CONTEXT_HEADER, None)
        return is_short

    @property
    def is_repeatable(self) -> bool:
        """Whether `plan` and `heartbeat` hold for every request whose head and settings are the same (`outline_of`)."""
        parsed = self.parsed
        return not (
            self.is_adapted
            or self.substitution_headers
            or parsed.is_load_only
            or parsed.ambiguous
            or parsed.unreadable
            or (self.path in _TRUNCATING and parsed.options)
            or self.rules.substitutes.aliases
            or self.rules.substitutes.fallbacks
        )

    def ticket(self, ticket_id: TicketId, now: float, timeout_seconds: float, request_id: str = "") -> Ticket:
        """The ticket that asks for a slot; `plan` must be set."""
        plan, identity, parsed = self.plan, self.client_identity, self.parsed
        assert plan is not None
        prompt_tokens = parsed.prompt_bytes // BYTES_PER_TOKEN
        options, context_length = plan.options, plan.context_length
        if parsed.prompt_bytes > plan.prompt_bytes_max and self.raises_context:
            context_length = self._raised_context(plan)
            options = tuple(sorted({**dict(plan.options), "num_ctx": context_length}.items()))
        return Ticket(
            id=ticket_id,
            model=plan.facts,
            options=options,
            context_length=context_length,
            keep_alive_seconds=plan.keep_alive_seconds,
            arrived_at=now,
            deadline=now + timeout_seconds,
            client=identity.client,
            session=identity.session,
            priority=identity.priority,
            prompt_tokens=prompt_tokens,
            output_tokens_max=parsed.output_tokens_max,
            is_flexible=plan.is_flexible,
            takes_default_context=plan.takes_default_context,
            layout=identity.layout,
            fingerprints=self.fingerprints if prompt_tokens >= TOKENS_MIN else None,
            request_id=request_id,
        )

    def estimated_tokens(self) -> tuple[int, int]:
        """Tokens of its prompt and of its output, by the prompt's text and the output that it allows."""
        output_tokens = self.parsed.output_tokens_max
        if self.path not in _GENERATING:
            output_tokens = 0
        elif output_tokens is None or output_tokens < 0:
            output_tokens = _USUAL_OUTPUT_TOKENS
        return self.parsed.prompt_bytes // BYTES_PER_TOKEN, min(output_tokens, _OUTPUT_TOKENS)

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
        key, fallback_for = self.client_identity.key, self.rules.substitutes.fallback_for
        passed_over = [*self.tried_models, self.model]
        fallback = fallback_for(self.requested_model, passed_over, code)
        while fallback is not None and key is not None and not key.allows_model(fallback):
            passed_over.append(fallback)
            fallback = fallback_for(self.requested_model, passed_over, code)
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
        if is_form(self.path, self.content_type):
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
        refuse_model(client_identity.key, model)
        return request
    if not _only_unloads(request):  # otherwise the response is immediate
        request.heartbeat = heartbeat_for(path, parsed, header, rules.heartbeat_seconds)
    target = rules.substitutes.target(model)
    if target is not None:
        request.substitute(target)
    refuse_cloud(request.model, cloud=rules.cloud)
    refuse_model(client_identity.key, request.model)
    return request


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


def refuse_model(key: AccessKey | None, model: str) -> None:
    """`model`: "" where none can be read.

    Raises:
        Forbidden: the key is not for this model.
    """
    if key is None or key.sees_all_models or (model and key.allows_model(model)):
        return
    if not model:
        raise Forbidden(f"key '{key.name}' is for some models only, and the request names none that can be read")
    raise Forbidden(f"key '{key.name}' may not use model '{model}'")


def unload_reply(path: str, model: str, now: datetime, done_reason: str = "unload") -> dict[str, object]:
    """An Ollama server's reply to a request that unloads, whether the model is loaded, busy or neither.

    The same to one that only loads, with `load` as `done_reason`.

    The router gives it itself, because a server that was asked would unload without the router's knowledge.
    """
    if path == "/api/embed":
        return {"model": model, "embeddings": []}
    if path == "/api/embeddings":
        return {"embedding": []}
    created_at = now.isoformat().replace("+00:00", "Z")
    content = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
    return {"model": model, "created_at": created_at, **content, "done": True, "done_reason": done_reason}


def _parse(path: str, content_type: str, body: bytes) -> ParsedBody:
    """Parses a body; of a form only the model.

    Raises:
        BadRequest: it has too many parts to be parsed within bounds.
    """
    if not is_form(path, content_type):
        return parse_body(body, path)
    fields = find_fields(body, content_type, "model")
    models = [body[field.start : field.end].decode(errors="replace") for field in fields]
    conflict = "model" if len(set(models)) > 1 else ""
    return ParsedBody(model=models[0] if models else "", conflict=conflict, unreadable=not models)


def _only_unloads(request: InferenceRequest) -> bool:
    try:
        return request.only_unloads()
    except RouterError:
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
