"""Converts a run to JSON-ready values: GPUs, requests, residency spans and annotations. `router.lab.plot` draws it."""

from __future__ import annotations

from router.lab.simulator.requests import Request
from router.lab.simulator.runner import Outcome


def record(outcome: Outcome) -> dict[str, object]:
    """Times in seconds of the run, rounded to milliseconds; sizes in bytes."""
    return {
        "gpus": [
            {"uuid": gpu.uuid, "index": gpu.index, "name": gpu.name, "usable_bytes": gpu.usable_bytes}
            for gpu in outcome.ledger.gpus
        ],
        "seconds": _round_ms(outcome.ended_at),
        "requests": [_request(request) for request in outcome.requests],
        "residency_spans": [
            {
                "server": span.server,
                "model": span.model,
                "bytes": dict(span.bytes_by_gpu),
                "host_bytes": span.host_bytes,
                "began": _round_ms(span.began_at),
                "ready": _round_ms(span.ready_at),
                "ended": _round_ms(span.ended_at),
            }
            for span in outcome.stats.residency_spans
        ],
        "notes": [[_round_ms(at), text] for at, text in outcome.stats.notes],
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
        "arrived": _round_ms(request.arrived_at),
        "first_token": _round_ms(request.first_token_at),
        "ended": _round_ms(request.ended_at),
        "outcome": request.outcome,
    }


def _round_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
