"""`llamayard logs [-f] [INSTANCE]`: the last lines that the servers have written, and with `-f` those that come.

The router's own log goes to its standard error: where that leads is up to what started it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient

_SILENCE_SECONDS = 30.0
"""A router sends something every second."""


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the router cannot be asked, or is gone while its lines are followed."""
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    query: dict[str, str] = {"lines": arguments.lines, "follow": "true" if arguments.follow else "false"}
    if arguments.instance is not None:
        query["instance"] = arguments.instance
    with client.lines("GET", f"/llamayard/logs?{urlencode(query)}", None, _SILENCE_SECONDS) as lines:
        for raw in lines:
            if raw.strip():
                print(raw if arguments.json else _text(json.loads(raw), arguments.instance), flush=True)
    if sys.stderr.isatty() and not arguments.follow and not arguments.json:
        print("the router's own log goes to its standard error: journalctl -u llamayard", file=sys.stderr)
    return EXIT_OK


def _text(row: Mapping[str, Any], instance: str | None) -> str:
    line = "".join(each if each.isprintable() or each == "\t" else " " for each in str(row["line"]))
    return line if instance is not None else f"{row['instance']}: {line}"
