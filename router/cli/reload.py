"""`llamayard reload`: tells the running router to read its configuration again, and prints what has changed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_OK
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient

_Row = Mapping[str, Any]
_TIMEOUT_SECONDS = 60.0
"""The checks read the files of all models with rules."""


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """EXIT_FAILED if the router refuses the configuration or cannot be reached."""
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    answer = client.call("POST", "/llamayard/reload", {}, _TIMEOUT_SECONDS)
    print_problems(f"warning: {warning}" for warning in answer.get("warnings") or ())
    print("\n".join(lines(answer)))
    return EXIT_OK


def lines(answer: _Row) -> Iterator[str]:
    """One line for each key."""
    changed, waiting = (cast("list[_Row]", answer.get(key) or []) for key in ("changed", "needs_restart"))
    for row in changed:
        yield f"{row['key']}: {_value(row, 'from')} -> {_value(row, 'to')}"
    for row in waiting:
        yield f"{row['key']}: needs a restart of the router ({_value(row, 'from')} -> {_value(row, 'to')})"
    if not (changed or waiting):
        yield "nothing has changed"


def _value(row: _Row, key: str) -> str:
    return json.dumps(row[key], ensure_ascii=False) if key in row else "…"
