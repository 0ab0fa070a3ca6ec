"""`llamayard explain MODEL`: where the running router would serve a request for the model now, and why.

Reads `GET /llamayard/explain`. Nothing is done.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_FAILED, EXIT_OK
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient
from router.cli.status_tables import WIDTH, Column, Row, render_table

_GIB = 1024**3
_OUTCOMES = {
    "serve": "would be served now",
    "load": "would be loaded",
    "wait": "would wait",
    "refuse": "would be refused",
}


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the request would be refused, or the router cannot be asked."""
    query = {"model": arguments.model} | ({"context": arguments.context} if arguments.context is not None else {})
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    document = client.get(f"/llamayard/explain?{urlencode(query)}")
    print(json.dumps(document, indent=2, ensure_ascii=False) if arguments.json else render_explanation(document))
    return EXIT_FAILED if document.get("outcome") == "refuse" else EXIT_OK


def render_explanation(document: Mapping[str, Any]) -> str:
    """The document as text of at most 100 columns."""
    return "\n\n".join(["\n".join(_head(document)), *placement_tables(document)])


def placement_tables(document: Mapping[str, Any]) -> list[str]:
    """The tables of those that leave, of replicas and of candidates, as far as there are any."""
    parts = (
        _section("LEAVES", _LEAVING, document.get("leaving")),
        _section("REPLICAS", _REPLICAS, document.get("replicas")),
        _section("CANDIDATES", _CANDIDATES, document.get("candidates"), _reason),
        _left_out(document),
    )
    return [part for part in parts if part]


def _head(document: Mapping[str, Any]) -> list[str]:
    where = f" on {document['instance']}" if document.get("instance") else ""
    where += f" (GPU {_gpus(document)})" if document.get("gpus") else ""
    words = _OUTCOMES.get(str(document.get("outcome")), str(document.get("outcome")))
    wait = document.get("expected_wait_seconds")
    when = "" if document.get("outcome") in ("serve", "refuse") else f"; first slot {_in_seconds(wait)}"
    position = f", position {document['position']}" if document.get("position") else ""
    first = f"{document.get('model')}, context {document.get('context_length')}: {words}{where}{when}{position}"
    lines = [*textwrap.wrap(first, WIDTH), *_indented(f"reason: {document.get('reason')}")]
    worth = document.get("worth_seconds")
    if worth is not None:
        lines += _indented(f"others may lose {worth:.1f} s for it at most")
    return lines


def _in_seconds(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"in about {seconds:.0f} s"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _section(title: str, columns: Sequence[Column], rows: Any, note: Any = None) -> str:
    return render_table(title, columns, rows, note) if rows else ""


def _left_out(document: Mapping[str, Any]) -> str:
    number = document.get("candidates_left_out")
    return f"{number} more candidates are left out" if number else ""


def _reason(row: Row) -> str:
    return str(row.get("reason") or "")


def _price(row: Row) -> str:
    price = row.get("price_seconds")
    return "-" if price is None else f"{price:.1f} s"


def _gib(row: Row) -> str:
    return " + ".join(f"{size / _GIB:.1f}" for size in row.get("per_gpu_bytes") or ()) or "-"


def _gpus(row: Row) -> str:
    return ", ".join(row.get("gpus") or ()) or "-"


_LEAVING = (
    Column("MODEL", lambda row: str(row["model"]), is_elastic=True),
    Column("INSTANCE", lambda row: str(row["instance"]), is_elastic=True),
    Column("RUNNING", lambda row: str(row["in_flight"])),
    Column("PRICE", _price),
    Column("MOVES TO", lambda row: str(row.get("moves_to") or "-")),
)
_REPLICAS = (
    Column("INSTANCE", lambda row: str(row["instance"]), is_elastic=True),
    Column("STATE", lambda row: str(row["state"])),
    Column("SLOTS", lambda row: f"{row['in_flight']}/{row['slots']}"),
    Column("CONTEXT", lambda row: str(row["context_length"])),
    Column("SERVES IT", lambda row: "yes" if row["serves"] else "no: other options"),
)
_CANDIDATES = (
    Column("INSTANCE", lambda row: f"{row['instance']}{' (new)' if row.get('is_new') else ''}", is_elastic=True),
    Column("GPUS", _gpus),
    Column("GIB", _gib, is_elastic=True),
    Column("SLOTS", lambda row: "-" if row.get("slots") is None else str(row["slots"])),
    Column("VERDICT", lambda row: str(row["verdict"])),
    Column("PRICE", _price),
    Column("EVICTS", lambda row: ", ".join(row.get("evicts") or ()) or "-", is_elastic=True),
)
