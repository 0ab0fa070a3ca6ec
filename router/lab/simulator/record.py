"""A run as JSON-ready values: requests, stays on GPUs, marks; what the picture is drawn from and others may read."""

from __future__ import annotations

from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Outcome


def record(outcome: Outcome) -> dict[str, object]:
    """Times in seconds of the run, sizes in bytes; rounded to milliseconds."""
    return {
        "gpus": [
            {"uuid": gpu.uuid, "index": gpu.index, "name": gpu.name, "usable_bytes": gpu.usable_bytes}
            for gpu in outcome.ledger.gpus
        ],
        "seconds": _ms(outcome.ended_at),
        "requests": [_request(request) for request in outcome.requests],
        "residency_spans": [
            {
                "server": span.server,
                "model": span.model,
                "bytes": dict(span.bytes_by_gpu),
                "host_bytes": span.host_bytes,
                "began": _ms(span.began_at),
                "ready": _ms(span.ready_at),
                "ended": _ms(span.ended_at),
            }
            for span in outcome.stats.residency_spans
        ],
        "notes": [[_ms(at), words] for at, words in outcome.stats.notes],
    }


def _request(request: Request) -> dict[str, object]:
    return {
        "id": request.id,
        "user": request.user,
        "session": request.session,
        "turn": request.turn,
        "model": request.model.name,
        "where": request.where,
        "prompt_tokens": request.prompt_tokens,
        "shared_tokens": request.shared_tokens,
        "generated_tokens": request.generated_tokens,
        "arrived": _ms(request.arrived_at),
        "first_token": _ms(request.first_token_at),
        "ended": _ms(request.ended_at),
        "outcome": request.outcome,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
