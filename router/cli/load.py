"""`llamayard load MODEL`: loads a model through the running router, as a client's first request would.

It waits in the queue like any request, and takes a slot until the model is loaded. Tells on standard error what it
waits for, then where the model went.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.loaded_models import GIB, loaded_models, rows_of, where
from router.cli.reporting import reports_problems
from router.cli.router_client import Refused, RouterClient, StatusError
from router.config.settings import ConfigError, Settings
from router.domain.context_length import parse_context_length

_T = TypeVar("_T")
_SPARE_SECONDS = 30.0
_PROGRESS_SECONDS = 3.0
"""Between two looks at how far the load has come."""
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

    def request() -> Mapping[str, str]:
        try:
            return client.headers_of("POST", "/api/generate", body, timeout)
        except Refused as error:
            if _NO_GENERATION not in str(error):
                raise
        return client.headers_of("POST", "/api/embed", {**body, "input": []}, timeout)

    def tell() -> None:
        with contextlib.suppress(Refused, StatusError):
            words = progress_of(client.get("/llamayard/status"), settings.aliases.get(model, model))
            print(f"llamayard: {model}: {words}, {time.monotonic() - started:.0f} s so far", file=sys.stderr)

    headers = while_telling(request, tell, _PROGRESS_SECONDS)
    seconds = round(time.monotonic() - started, 1)
    served_by, answered = headers.get("x-llamayard-instance", ""), headers.get("x-llamayard-model", model)
    rows = rows_of(loaded_models(client.get("/llamayard/status")), answered)
    row = next((row for row in rows if row["instance"] == served_by or row["always_loaded"]), None)
    if row is None:
        raise StatusError(
            f"{model} was loaded on {served_by or 'an instance'}, and has left it since: llamayard status"
        )
    return {**row, "seconds": seconds}


def while_telling(work: Callable[[], _T], tell: Callable[[], None], every_seconds: float) -> _T:
    """What `work` returns or raises, done in a thread that Ctrl-C does not wait for; calls `tell` again and again."""
    ended: queue.SimpleQueue[Callable[[], _T]] = queue.SimpleQueue()

    def run_work() -> None:
        try:
            result = work()
        except Exception as error:  # it is raised to the caller
            failure = error

            def fail() -> _T:
                raise failure

            ended.put(fail)
        else:
            ended.put(lambda: result)

    threading.Thread(target=run_work, daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=every_seconds)()
        tell()


def progress_of(status: Mapping[str, Any], model: str) -> str:
    """What a model that is to be loaded waits for, by the status document."""
    moving = [row for row in rows_of(loaded_models(status), model) if row["state"] != "ready"]
    if moving:
        return f"{moving[0]['state']} on {where(moving[0])}"
    waiting = {str(row.get("model")): str(row.get("reason") or "") for row in status.get("waiting") or ()}
    names = [name for name in waiting if rows_of([{"model": name}], model)]
    return f"waits: {waiting[names[0]]}" if names and waiting[names[0]] else "waits"


def _text(row: Mapping[str, Any]) -> str:
    if row["always_loaded"]:
        return f"{row['model']}: on {where(row)}, an attached server, which has it loaded; slots {row['slots']}"
    size = f"{row['size_bytes'] / GIB:.1f} GiB"
    first = f"{row['model']}: on {where(row)}, context {row['context_length']}, slots {row['slots']}, {size}"
    return f"{first}, in {row['seconds']:.1f} s\n  reason: {row['reason']}"
