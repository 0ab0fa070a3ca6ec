"""An operator's commands for models: load and unload, which need a key of the class `admin` and no other.

A load takes a slot as a client's first request would, waiting its turn in the queue, and gives it back at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from router.api.context import ApiContext
from router.api.explain import imagined_request
from router.control.controller import rejection
from router.domain.actions import Grant, Reject
from router.domain.client_identity import ClientIdentity
from router.domain.events import UnloadRequested
from router.domain.model import ModelFacts
from router.domain.request import Ticket
from router.domain.snapshot_index import replicas_of
from router.errors import UNREADABLE_JSON, BadRequest, Forbidden
from router.observability.request_record import RequestRecord

LOAD, UNLOAD = "/llamayard/load", "/llamayard/unload"
_FORM = 'send {"model": "NAME"}'


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    model: str = ""
    context: int | str | None = None
    """Tokens, for a load."""


async def run_model_command(context: ApiContext, body: bytes, record: RequestRecord) -> Mapping[str, Any]:
    """Carries out the command of the record's route, and returns the answer as JSON.

    Raises:
        BadRequest: the body is no command.
        ModelNotFound, Forbidden: there is no such model, or the key is not for it.
        RouterError: why the model cannot be loaded.
    """
    command = _parsed(body)
    query = {"model": command.model}
    if command.context is not None:
        query["context"] = str(command.context)
    request = imagined_request(context, query, ClientIdentity(client=record.client, key=record.key))
    facts = await context.required_model(request.model)
    record.model = facts.name
    if record.route == UNLOAD:
        return _unload(context, facts, record)
    request.plan_for(facts)
    seconds = context.limits.queue_timeout_seconds
    controller = context.controller
    ticket = request.ticket(controller.new_ticket_id(), controller.now(), seconds, record.request_id)
    return await _load(context, ticket)


def _parsed(body: bytes) -> _Command:
    try:
        command = msgspec.json.decode(body.strip() or b"{}", type=_Command)
    except UNREADABLE_JSON as error:
        raise BadRequest(f"the body is no command: {error}; {_FORM}") from error
    if not command.model.strip():
        raise BadRequest(f"model: missing; {_FORM}")
    return command


def _unload(context: ApiContext, facts: ModelFacts, record: RequestRecord) -> Mapping[str, Any]:
    if record.key is not None and not record.key.may_unload:
        raise Forbidden(f"key '{record.key.name}' may not unload models (--keep-alive-min)")
    controller = context.controller
    controller.post(UnloadRequested(facts.blob))
    replicas = replicas_of(controller.snapshot(), facts.blob)
    return {
        "model": facts.name,
        "replicas": [{"instance": r.instance, "state": r.state.value, "in_flight": r.in_flight} for r in replicas],
    }


async def _load(context: ApiContext, ticket: Ticket) -> Mapping[str, Any]:
    controller = context.controller
    decision: asyncio.Future[Grant | Reject] = asyncio.get_running_loop().create_future()

    def decided(answer: Grant | Reject) -> None:
        if not decision.done():
            decision.set_result(answer)
        elif isinstance(answer, Grant):
            controller.release(ticket.id)

    controller.submit(ticket, decided)
    try:
        answer = await decision
    except asyncio.CancelledError:
        controller.cancel(ticket.id)
        raise
    if isinstance(answer, Reject):
        raise rejection(answer)
    controller.release(ticket.id)
    return {"model": ticket.model.name, "instance": answer.instance, "reason": answer.reason}
