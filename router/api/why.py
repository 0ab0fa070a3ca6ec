"""`GET /llamayard/why`: what became of a past or waiting request, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from router.api.explain import explanation_document, rounded
from router.control.controller import Controller
from router.domain.actions import Grant, Reject
from router.errors import BadRequest
from router.http1.headers import sanitized_request_id
from router.observability.request_history import Ending, RequestHistory, RequestTrace


def why(controller: Controller, history: RequestHistory, query: Mapping[str, str]) -> dict[str, Any]:
    """The attempts of the request with that `request_id`; none if it is not remembered.

    Raises:
        BadRequest: no `request_id`.
    """
    request_id = sanitized_request_id(query.get("request_id"))
    if not request_id:
        raise BadRequest(
            "request_id: missing; ask for /llamayard/why?request_id=ID, with the X-Request-ID of a response"
        )
    attempts = [_attempt(controller, history, trace) for trace in history.find(request_id)]
    return {"request_id": request_id, "attempts": attempts}


def _attempt(controller: Controller, history: RequestHistory, trace: RequestTrace) -> dict[str, Any]:
    """JSON of one attempt; its keys are listed in docs/placement.md and only ever added to."""
    now = controller.now()
    answer, ended_at, released = trace.answer, trace.ended_at, trace.released
    waits = controller.wait_estimate(trace.ticket_id) if trace.ending is Ending.WAITING else None
    placement = controller.explain_placement(trace.ticket_id)
    return {
        "model": trace.model,
        "arrived_at": _utc(trace.arrived_at, now),
        "outcome": trace.ending.value,
        "waited_seconds": _seconds(trace.arrived_at, now if ended_at is None else ended_at),
        "instance": answer.instance if isinstance(answer, Grant) else None,
        "reason": waits.reason if waits is not None else _reason(answer),
        "error_code": answer.code if isinstance(answer, Reject) else None,
        "position": None if waits is None else waits.position,
        "expected_wait_seconds": None if waits is None else rounded(waits.expected_wait_seconds),
        "time_to_first_token_seconds": _seconds(trace.arrived_at, None if released is None else released.first_byte_at),
        "duration_seconds": _seconds(trace.arrived_at, trace.released_at),
        "output_tokens": 0 if released is None else released.output_tokens,
        "runner_lost": released is not None and released.runner_lost,
        "placement": None if placement is None else explanation_document(*placement),
        "meanwhile": [
            {
                "at": _utc(step.at, now),
                "event": step.event,
                "model": step.model,
                "instance": step.instance,
                "reason": step.reason,
            }
            for step in history.meanwhile(trace)
        ],
    }


def _reason(answer: Grant | Reject | None) -> str:
    match answer:
        case Grant():
            return answer.reason
        case Reject():
            return answer.message
        case None:
            return ""


def _utc(at: float, now: float) -> str:
    """`at` in seconds of the controller's clock, which reads `now`."""
    return (datetime.now(UTC) - timedelta(seconds=now - at)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 3)
