"""`llamayard load MODEL`: loads a model through the running router, as a client's first request would.

It waits in the queue like any request, and takes a slot until the model is loaded. Tells where it went.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.loaded_models import GIB, loaded_models, rows_of, where
from router.cli.reporting import reports_problems
from router.cli.router_client import Refused, RouterClient, StatusError
from router.config.settings import ConfigError, Settings
from router.domain.context_length import parse_context_length

_SPARE_SECONDS = 30.0
_NO_GENERATION = "does not support generate"
"""A server's words about an embedding model."""


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the model is not loaded or the router cannot be asked."""
    inputs = inputs_of(arguments, environment)
    settings, client = inputs.settings(), RouterClient(inputs.endpoint())
    loaded = _load(client, arguments.model, _tokens(arguments.context), settings)
    print(json.dumps(loaded, indent=2, ensure_ascii=False) if arguments.json else _text(loaded))
    return EXIT_OK


def _tokens(text: str | None) -> int | None:
    try:
        return None if text is None else parse_context_length(text)
    except ValueError as error:
        raise ConfigError([f"--context {text}: {error}"]) from error


def _load(client: RouterClient, model: str, tokens: int | None, settings: Settings) -> dict[str, Any]:
    """Where the model is afterwards. Errors as `RouterClient.call`."""
    timeout = settings.queue.timeout_seconds + settings.ollama.load_timeout_seconds + _SPARE_SECONDS
    body: dict[str, Any] = {"model": model, "stream": False}
    if tokens is not None:
        body["options"] = {"num_ctx": tokens}
    client.get("/llamayard/status")  # a key that may not see where it went is refused before the load
    started = time.monotonic()
    try:
        headers = client.headers_of("POST", "/api/generate", body, timeout)
    except Refused as error:
        if _NO_GENERATION not in str(error):
            raise
        headers = client.headers_of("POST", "/api/embed", {**body, "input": []}, timeout)
    seconds = round(time.monotonic() - started, 1)
    served_by, answered = headers.get("x-llamayard-instance", ""), headers.get("x-llamayard-model", model)
    rows = rows_of(loaded_models(client.get("/llamayard/status")), answered)
    row = next((row for row in rows if row["instance"] == served_by), None)
    if row is None:
        raise StatusError(
            f"{model} was loaded on {served_by or 'an instance'}, and has left it since: llamayard status"
        )
    return {**row, "seconds": seconds}


def _text(row: Mapping[str, Any]) -> str:
    size = f"{row['size_bytes'] / GIB:.1f} GiB"
    first = f"{row['model']}: on {where(row)}, context {row['context_length']}, slots {row['slots']}, {size}"
    return f"{first}, in {row['seconds']:.1f} s\n  reason: {row['reason']}"
