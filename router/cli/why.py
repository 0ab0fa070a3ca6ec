"""`llamayard why REQUEST_ID`: what became of a request, where it was served and for what it waited.

Reads `GET /llamayard/why`. The id is the `X-Request-ID` of the response, or `request_id` in the log.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_OK
from router.cli.explain import placement_tables
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient
from router.cli.status_tables import WIDTH


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the router does not remember the request or cannot be asked."""
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    document = client.get(f"/llamayard/why?{urlencode({'request_id': arguments.request_id})}")
    attempts: list[Any] = document.get("attempts") or []
    if arguments.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    elif not attempts:
        print_problems(
            [
                f"the router does not remember a request {arguments.request_id}: it keeps the latest ones since "
                "its start that asked for a slot; older ones are in its log"
            ]
        )
    else:
        print("\n\n".join(_render(attempt) for attempt in attempts))
    return EXIT_OK if attempts else EXIT_FAILED


def _render(attempt: Mapping[str, Any]) -> str:
    """One attempt as text of at most 100 columns."""
    placement: Mapping[str, Any] = attempt.get("placement") or {}
    tables = placement_tables(placement)
    then = [f"when its load was planned on {placement.get('instance')}:"] if tables else []
    return "\n\n".join(["\n".join(_lines(attempt)), *then, *tables])


def _lines(attempt: Mapping[str, Any]) -> Iterator[str]:
    where = f" on {attempt['instance']}" if attempt.get("instance") else ""
    code = f" ({attempt['error_code']})" if attempt.get("error_code") else ""
    head = f"{attempt['model']}, {attempt['arrived_at']}: {attempt['outcome']}{where}{code}, "
    yield from textwrap.wrap(f"{head}{_waited(attempt)}", WIDTH)
    if attempt.get("reason"):
        yield from _indented(f"reason: {attempt['reason']}")
    yield from _indented(_answered(attempt))
    for step in attempt.get("meanwhile") or ():
        what = " ".join(part for part in (step["event"], step["model"]) if part)
        yield from _indented(f"{step['at'][11:23]}  {what} on {step['instance']}: {step['reason']}".rstrip(": "))


def _waited(attempt: Mapping[str, Any]) -> str:
    waited = f"waited {attempt['waited_seconds']:.3f} s"
    if attempt.get("position") is None:
        return waited
    expected = attempt.get("expected_wait_seconds")
    more = "an unknown time" if expected is None else f"about {expected:.0f} s"
    return f"{waited}, {more} to go, position {attempt['position']}"


def _answered(attempt: Mapping[str, Any]) -> str:
    parts: list[str] = []
    if attempt.get("time_to_first_token_seconds") is not None:
        parts.append(f"first token after {attempt['time_to_first_token_seconds']:.3f} s")
    if attempt.get("duration_seconds") is not None:
        parts.append(f"ended after {attempt['duration_seconds']:.3f} s")
    if attempt.get("output_tokens"):
        parts.append(f"{attempt['output_tokens']} tokens")
    if attempt.get("runner_lost"):
        parts.append("its runner died")
    return ", ".join(parts)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
