"""`llamayard unload MODEL`: unloads a model from all instances of the running router, as `ollama stop` would.

A replica with running requests is unloaded when they have ended; a model with `keep_warm` stays.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_FAILED, EXIT_OK
from router.cli.loaded_models import is_kept_warm, loaded_models, rows_of, where
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient

_WAIT_SECONDS = 30.0
"""For idle replicas to leave; an unload takes a second or two."""
_POLL_SECONDS = 0.3


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if a replica stays, or the router cannot be asked."""
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    never = threading.Event()
    result = unload(client, arguments.model, lambda: never.wait(_POLL_SECONDS), time.monotonic)
    print(json.dumps(result, indent=2, ensure_ascii=False) if arguments.json else _text(result))
    return EXIT_FAILED if any(not row["in_flight"] for row in result["remaining"]) else EXIT_OK


def unload(client: RouterClient, model: str, pause: Callable[[], object], now: Callable[[], float]) -> dict[str, Any]:
    """Asks for it, and waits until the idle replicas have left: `model`, `unloaded[]`, `remaining[]`.

    Errors as `RouterClient.call`.
    """
    before = loaded_models(client.get("/llamayard/status"))
    # An alias is resolved by the router; the names of its models are in the status.
    headers = client.headers_of("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    name = headers.get("x-llamayard-model", model)
    there = rows_of(before, name)
    deadline = now() + _WAIT_SECONDS
    remaining = there
    while there:
        remaining = rows_of(loaded_models(client.get("/llamayard/status")), name)
        if not any(_leaves_soon(row) for row in remaining) or now() >= deadline:
            break
        pause()
    left = {row["instance"] for row in remaining}
    return {"model": name, "unloaded": [row for row in there if row["instance"] not in left], "remaining": remaining}


def _leaves_soon(row: Mapping[str, Any]) -> bool:
    return not row["in_flight"] and not is_kept_warm(row) and not row["always_loaded"]


def _text(result: Mapping[str, Any]) -> str:
    model = result["model"]
    lines = [f"{model}: unloaded from {where(row)}" for row in result["unloaded"]]
    for row in result["remaining"]:
        if row["in_flight"]:
            lines.append(f"{model}: leaves {where(row)} when its running requests ({row['in_flight']}) have ended")
        elif is_kept_warm(row):
            lines.append(f"{model}: stays on {where(row)}: models.{model}.keep_warm")
        elif row["always_loaded"]:
            lines.append(f"{model}: stays on {where(row)}: an attached server decides itself what it has loaded")
        else:
            lines.append(f"{model}: still on {where(row)} ({row['state']}): see llamayard status")
    return "\n".join(lines) or f"{model}: is not loaded"
