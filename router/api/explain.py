"""`GET /llamayard/explain`: what would become of a request for a model now, as JSON. Nothing is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from router.api.context import ApiContext
from router.domain.client_identity import ClientIdentity
from router.domain.context_length import parse_context_length
from router.domain.explanation import CandidateReport, Explanation
from router.domain.gpu import GpuUuid
from router.domain.snapshot import Snapshot
from router.errors import BadRequest
from router.llm_api.inference_request import InferenceRequest, read_request
from router.scheduler.placement.explain import gpu_label

_CANDIDATES_SHOWN_MAX = 100
_PATH = "/api/chat"
"""The request that is thought of."""
NOBODY = ClientIdentity()


async def explain(context: ApiContext, query: Mapping[str, str]) -> dict[str, Any]:
    """The decision on a chat request of a client that has no other requests; keys `model` and `context` of the query.

    Raises:
        BadRequest: a key is missing or wrong.
        ModelNotFound: no server has the model.
        RouterError: a server that may have it is down, or the model is a cloud model.
    """
    request = imagined_request(context, query)
    facts = await context.required_model(request.model)
    request.plan_for(facts)
    controller = context.controller
    ticket = request.ticket(controller.new_ticket_id(), controller.now(), context.limits.queue_timeout_seconds)
    found = controller.explain(ticket)
    requested = dict(ticket.options).get("num_ctx") or ticket.context_length or context.rules.default_context_length
    return {
        "model": facts.name,
        "requested_model": request.requested_model,
        "context_length": int(requested),
        **explanation_document(found, controller.snapshot()),
    }


def imagined_request(
    context: ApiContext, query: Mapping[str, str], identity: ClientIdentity = NOBODY
) -> InferenceRequest:
    """A chat request for `model` of the query, with `context` tokens if it names them.

    Raises:
        BadRequest: a key is missing or wrong.
        Forbidden: the client's access key is not for this model.
    """
    model = query.get("model", "").strip()
    if not model:
        raise BadRequest("model: missing; name one, as in /llamayard/explain?model=NAME")
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "?"}]}
    tokens = _context_tokens(query.get("context"))
    if tokens is not None:
        body["options"] = {"num_ctx": tokens}
    return read_request(context.rules, _PATH, json.dumps(body).encode(), lambda _: None, identity)


def _context_tokens(text: str | None) -> int | None:
    try:
        return None if text is None else parse_context_length(text)
    except ValueError as error:
        raise BadRequest(f"context: {text!r} {error}") from error


def explanation_document(found: Explanation, snapshot: Snapshot) -> dict[str, Any]:
    """JSON of an explanation; its keys are listed in docs/placement.md and only ever added to."""
    return {
        "outcome": found.outcome.value,
        "reason": found.reason,
        "error_code": found.error_code,
        "instance": found.instance,
        "gpus": _indexes(snapshot, found.gpus),
        "options": dict(found.options),
        "position": found.position,
        "expected_wait_seconds": rounded(found.expected_wait_seconds),
        "load_seconds": rounded(found.load_seconds),
        "worth_seconds": rounded(found.worth_seconds),
        "leaving": [
            {
                "model": each.name,
                "instance": each.instance,
                "in_flight": each.in_flight,
                "price_seconds": rounded(each.price_seconds),
                "moves_to": each.moves_to,
            }
            for each in found.leaving
        ],
        "replicas": [
            {
                "instance": each.instance,
                "state": each.state,
                "in_flight": each.in_flight,
                "slots": each.slots,
                "context_length": each.context_length,
                "serves": each.serves,
            }
            for each in found.replicas
        ],
        "candidates": [_candidate(each, snapshot) for each in found.candidates[:_CANDIDATES_SHOWN_MAX]],
        "candidates_left_out": max(0, len(found.candidates) - _CANDIDATES_SHOWN_MAX),
    }


def _candidate(report: CandidateReport, snapshot: Snapshot) -> dict[str, Any]:
    names = [snapshot.residencies[key].name for key in report.evict if key in snapshot.residencies]
    return {
        "instance": report.instance,
        "gpus": _indexes(snapshot, report.gpus),
        "is_new": report.is_new,
        "verdict": report.verdict.value,
        "price_seconds": rounded(report.price_seconds),
        "per_gpu_bytes": list(report.per_gpu_bytes),
        "slots": report.slots,
        "evicts": names,
        "reason": report.reason,
    }


def _indexes(snapshot: Snapshot, gpus: tuple[GpuUuid, ...]) -> list[str]:
    return [gpu_label(snapshot, gpu) for gpu in gpus]


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
