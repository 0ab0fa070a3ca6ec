"""`llamayard status`: prints the state of the running router, once or again and again.

Reads `GET /llamayard/status`.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.cli.router_client import Refused, RouterClient, StatusError
from router.cli.status_tables import render_status
from router.config.inputs import ConfigError
from router.config.parsing import duration_seconds

_CLEAR_SCREEN = "\x1b[H\x1b[2J"


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the status cannot be read."""
    try:
        server = inputs_of(arguments, environment).endpoint()
        watch_seconds = _watch_seconds(arguments.watch)
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED

    def read() -> str:
        document = fetch_status(server.host, server.port, server.tls_certificate)
        return json.dumps(document, indent=2) if arguments.json else render_status(document)

    if watch_seconds is not None:
        never = threading.Event()
        watch(read, lambda: never.wait(watch_seconds), "" if arguments.json else _CLEAR_SCREEN)
    try:
        print(read())
    except StatusError as error:
        print_problems([str(error)])
        return EXIT_FAILED
    return EXIT_OK


def _watch_seconds(text: str | None) -> float | None:
    """Seconds between two readings; None: read once. Raises ConfigError."""
    if text is None:
        return None
    try:
        seconds = duration_seconds(text)
    except ValueError as error:
        raise ConfigError([f"--watch {text}: {error}"]) from error
    if not isinstance(seconds, float) or not 0.1 <= seconds <= 3600.0:
        raise ConfigError([f"--watch {text}: must be from 0.1 to 3600 seconds"])
    return seconds


def watch(read: Callable[[], str], pause: Callable[[], object], clear: str) -> NoReturn:
    """Prints what is read until Ctrl-C, each time after `clear`. A router that is down is reported, not fatal."""
    while True:
        try:
            text = read()
        except StatusError as error:
            text = f"llamayard: {error}"
        print(f"{clear}{text}", flush=True)
        pause()


def fetch_status(host: str, port: int, certificate: Path | None = None) -> dict[str, Any]:
    """The status document of the router at that address; with a certificate over TLS, trusting only that one.

    Raises:
        StatusError: no answer within ten seconds, or the server is not llamayard.
    """
    try:
        return RouterClient(host, port, certificate).get("/llamayard/status")
    except Refused as error:
        raise StatusError(f"the router refuses: {error}") from error
