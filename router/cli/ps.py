"""`llamayard ps`: the loaded models of all instances, as `ollama ps`, with GPUs, instance, expiry and pin."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.loaded_models import GIB, loaded_models
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient
from router.cli.status_tables import Column, Row, render_table

_MINUTE, _HOUR = 60.0, 3600.0


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the router cannot be asked."""
    status = RouterClient(inputs_of(arguments, environment).endpoint()).get("/llamayard/status")
    rows = loaded_models(status)
    print(json.dumps({"models": rows}, indent=2, ensure_ascii=False) if arguments.json else render_ps(rows))
    return EXIT_OK


def render_ps(rows: Sequence[dict[str, Any]]) -> str:
    """The models as a table of at most 100 columns."""
    return render_table("MODELS", _COLUMNS, rows)


def _size(row: Row) -> str:
    return f"{row['size_bytes'] / GIB:.1f} GiB" if row["size_bytes"] else "-"


def _until(row: Row) -> str:
    seconds = row.get("expires_in_seconds")
    if seconds is None:
        return "forever"
    if seconds >= _HOUR:
        return f"{seconds / _HOUR:.0f} h"
    return f"{seconds / _MINUTE:.0f} min" if seconds >= _MINUTE else f"{max(0.0, seconds):.0f} s"


def pin_text(pin: Row) -> str:
    """`GPU 0, 1, spread, warm, until restart`; `-` for no pin."""
    parts = [f"GPU {', '.join(pin['gpus'])}"] if pin.get("gpus") else []
    parts += [pin["layout"]] if pin.get("layout") not in (None, "auto") else []
    parts += ["warm"] if pin.get("keep_warm") else []
    parts += ["until restart"] if pin.get("origin") == "run time" else []
    return ", ".join(parts) or "-"


_COLUMNS = (
    Column("MODEL", lambda row: str(row["model"]), is_elastic=True),
    Column("SIZE", _size),
    Column("GPU", lambda row: ", ".join(row["gpus"]) or ("-" if row.get("attached") else "CPU")),
    Column("INSTANCE", lambda row: str(row["instance"]), is_elastic=True),
    Column("STATE", lambda row: str(row["state"])),
    Column("SLOTS", lambda row: f"{row['in_flight']}/{row['slots']}"),
    Column("CONTEXT", lambda row: str(row["context_length"])),
    Column("UNTIL", _until),
    Column("PIN", lambda row: pin_text(row.get("pin") or {}), is_elastic=True),
)
