"""What one request wants of the fleet, read from its body and headers, and its body as the granted copy shall get it.

The body forwarded is the client's, byte for byte, but for the members that are the router's business: `keep_alive`
(its own timers honour it), the placement options `num_gpu` and `main_gpu`, and, where the model is protected from
reloads, the runner options in which the request differs from the copy that serves it. Every way into the router (the
relay and aiohttp) builds its requests here. Pure: it asks nobody and decides no place.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from router.admission.client_identity import ClientIdentity
from router.domain.actions import Grant
from router.domain.keep_alive import parse_keep_alive
from router.domain.model import ModelFacts
from router.domain.request import RunnerOptions, Ticket, TicketId
from router.engines.ollama.runner_options import PLACEMENT_OPTIONS, RUNNER_OPTIONS, runner_options
from router.errors import BadRequest
from router.llm_api.body_reader import ParsedBody
from router.llm_api.json_edit import remove_nested, set_member, set_nested, set_only
from router.llm_api.prompt_fingerprint import TOKENS_MIN, fingerprints_of
from router.scheduler.balancing.prefix_affinity import BYTES_PER_TOKEN


class RoutingRequest(msgspec.Struct, frozen=True):
    """A request as far as routing is concerned."""

    path: str
    facts: ModelFacts
    options: RunnerOptions
    """Runner options in effect: the Modelfile's parameters under the request's own, defaults left out."""
    context_length: int
    """Tokens asked for, 0 where nothing says."""
    keep_alive_seconds: float | None
    prompt_tokens: int
    output_tokens_max: int | None
    is_flexible: bool
    """Whether a copy with other runner options may serve: only `/api` bodies can be adapted to it."""
    dropped: tuple[str, ...]
    """Placement options of the client's that are not passed on."""
    body: bytes
    default_context_length: int

    def ticket(
        self,
        number: TicketId,
        client_identity: ClientIdentity,
        now: float,
        timeout_seconds: float,
        request_id: str = "",
    ) -> Ticket:
        return Ticket(
            id=number,
            model=self.facts,
            options=self.options,
            context_length=self.context_length,
            keep_alive_seconds=self.keep_alive_seconds,
            arrived_at=now,
            deadline=now + timeout_seconds,
            client=client_identity.client,
            session=client_identity.session,
            priority=client_identity.priority,
            prompt_tokens=self.prompt_tokens,
            output_tokens_max=self.output_tokens_max,
            is_flexible=self.is_flexible,
            layout=client_identity.layout,
            fingerprints=self.fingerprints if self.prompt_tokens >= TOKENS_MIN else None,
            request_id=request_id,
        )

    def fingerprints(self) -> tuple[int, ...]:
        """Of the beginning of its prompt."""
        return fingerprints_of(self.path, self.body)

    def again(self, body: bytes, seen: ParsedBody) -> RoutingRequest:
        """The same for another body that gives no options either."""
        return RoutingRequest(
            self.path,
            self.facts,
            self.options,
            self.context_length,
            self.keep_alive_seconds,
            seen.prompt_bytes // BYTES_PER_TOKEN,
            seen.output_tokens_max,
            self.is_flexible,
            self.dropped,
            body,
            self.default_context_length,
        )

    def body_for(self, grant: Grant) -> bytes:
        """The body with which the granted copy does not reload."""
        if not self.is_flexible or grant.options == self.options:
            return self.body
        body = self.body
        asked, loaded = dict(self.options), dict(grant.options)
        for name in RUNNER_OPTIONS:
            if asked.get(name) == loaded.get(name):
                continue
            value = loaded.get(name, self._default(name))
            text = None if value is None else str(value).lower().encode()
            body = remove_nested(body, "options", name) if text is None else set_nested(body, "options", name, text)
        return body

    def _default(self, name: str) -> int | bool | None:
        return self.default_context_length if name == "num_ctx" else RUNNER_OPTIONS[name]


def build_routing_request(
    path: str, seen: ParsedBody, facts: ModelFacts, body: bytes, default_context_length: int, protect: bool = True
) -> RoutingRequest:
    """What the request wants. `protect`: whether its model is kept from reloads that only options ask for.

    Raises:
        BadRequest: `keep_alive` is no duration; in the server's words.
    """
    options = runner_options(facts, seen.options, default_context_length)
    keep_alive = keep_alive_of(seen)
    dropped = tuple(name for name in PLACEMENT_OPTIONS if name in seen.options) if protect else ()
    for name in dropped:
        body = remove_nested(body, "options", name)
    if keep_alive is not None:
        # The server must never unload by itself what the router counts on: its timers are the router's.
        put = set_member if seen.ambiguous else set_only
        body = put(body, "keep_alive", b"-1")
    return RoutingRequest(
        path=path,
        facts=facts,
        options=options,
        context_length=_context(options),
        keep_alive_seconds=keep_alive,
        prompt_tokens=seen.prompt_bytes // BYTES_PER_TOKEN,
        output_tokens_max=seen.output_tokens_max,
        is_flexible=protect and path.startswith("/api/"),
        dropped=dropped,
        body=body,
        default_context_length=default_context_length,
    )


def keep_alive_of(seen: ParsedBody) -> float | None:
    """Seconds, negative for ever, None where the request says nothing.

    Raises:
        BadRequest: the server would refuse it; in its words.
    """
    try:
        return parse_keep_alive(seen.keep_alive, plain_seconds=False)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def _context(options: RunnerOptions) -> int:
    asked = dict(options).get("num_ctx")
    return int(asked) if asked is not None else 0


def reply_notes(routing: RoutingRequest) -> Mapping[str, str]:
    """Headers that tell the client what of its request was not passed on."""
    return {"X-Llamayard-Dropped-Options": ", ".join(routing.dropped)} if routing.dropped else {}


def unloaded(path: str, model: str, now: datetime) -> dict[str, object]:
    """What a server says to a request that unloads, whether the model is loaded, busy or neither.

    Said here, because a server that was asked would unload by itself, behind the books.
    """
    if path == "/api/embed":
        return {"model": model, "embeddings": []}
    if path == "/api/embeddings":
        return {"embedding": []}
    created_at = now.isoformat().replace("+00:00", "Z")
    said = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
    return {"model": model, "created_at": created_at, **said, "done": True, "done_reason": "unload"}
