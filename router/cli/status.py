"""`llamayard status`: prints the state of the running router as tables.

Reads `GET /llamayard/status`; a missing value is shown as a dash.
"""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.config.settings import ConfigError

_GIB = 1024**3
_TIMEOUT_SECONDS = 10.0

Row = Mapping[str, Any]


class StatusError(Exception):
    """The status cannot be read; the text says why and what to do."""


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if the status cannot be read."""
    try:
        server = inputs_of(arguments, environment).settings().server
        document = fetch_status(server.host, server.port, server.tls_certificate)
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    except StatusError as error:
        print_problems([str(error)])
        return EXIT_FAILED
    print(json.dumps(document, indent=2) if arguments.json else render_status(document))
    return EXIT_OK


def _connection(host: str, port: int, certificate: Path | None) -> http.client.HTTPConnection:
    if certificate is None:
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False  # the address is used, which a certificate rarely contains
    return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context)


def fetch_status(host: str, port: int, certificate: Path | None = None) -> dict[str, Any]:
    """The status document of the router at that address; with a certificate over TLS, trusting only that one.

    Raises:
        StatusError: no answer within ten seconds, or the server is not llamayard.
    """
    address = f"{_reachable(host)}:{port}"
    try:
        connection = _connection(_reachable(host), port, certificate)
        with closing(connection):
            connection.request("GET", "/llamayard/status", headers={"Host": f"localhost:{port}"})
            reply = connection.getresponse()
            body = reply.read()
    except (OSError, http.client.HTTPException) as error:  # ssl.SSLError is an OSError
        reason = str(error) or type(error).__name__
        raise StatusError(f"no answer from {address} ({reason}); is `llamayard serve` running?") from error
    if reply.status != http.client.OK:
        raise StatusError(
            f"{address} answers {reply.status} to /llamayard/status: it is not llamayard, perhaps a stock Ollama"
        )
    try:
        document: object = json.loads(body)
    except ValueError as error:
        raise StatusError(f"{address} answers /llamayard/status, but not JSON") from error
    if not isinstance(document, dict):
        raise StatusError(f"{address} answers /llamayard/status, but not a JSON object")
    return cast("dict[str, Any]", document)


def render_status(status: Mapping[str, Any]) -> str:
    """The document as text: GPUs, instances, models, reservations, queue and waiting requests."""
    parts = [
        *([str(status["emulated"])] if status.get("emulated") else []),
        _table("GPUS", _GPUS, _rows(status, "gpus")),
        _table("INSTANCES", _INSTANCES, _rows(status, "instances")),
        _table("MODELS", _MODELS, _rows(status, "models")),
        _table("RESERVATIONS", _RESERVATIONS, _rows(status, "reservations")),
        f"QUEUE\n  {_queue(status.get('queue'))}",
        *([_table("WAITING", _WAITING, _rows(status, "waiting"))] if status.get("waiting") else []),
    ]
    return "\n\n".join(parts)


def _reachable(host: str) -> str:
    """The address of a listener on `host`, from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _rows(status: Mapping[str, Any], key: str) -> list[Row]:
    value: object = status.get(key)
    return (
        [cast("Row", item) for item in cast("list[object]", value) if isinstance(item, Mapping)]
        if isinstance(value, list)
        else []
    )


def _table(title: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    if not rows:
        return f"{title}\n  none"
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "\n".join([title, *("  " + _line(line, widths) for line in lines)])


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) in (None, "") else str(row[key])


def _gib(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / _GIB:.1f} GiB" if isinstance(row.get(key), int) else "-"


def _joined(key: str) -> Callable[[Row], str]:
    return lambda row: ", ".join(map(str, row[key])) if row.get(key) else "-"


def _gib_per_gpu(row: Row) -> str:
    value: object = row.get("per_gpu_bytes")
    sizes = list(cast("Mapping[str, int]", value).values()) if isinstance(value, Mapping) else value
    if not isinstance(sizes, list) or not sizes:
        return "-"
    return " + ".join(f"{size / _GIB:.1f}" for size in cast("list[int]", sizes)) + " GiB"


def _slots(row: Row) -> str:
    return f"{row.get('in_flight', '-')}/{row.get('slots', '-')}"


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.0f} s" if isinstance(row.get(key), int | float) else "-"


def _queue(queue: object) -> str:
    if not isinstance(queue, Mapping):
        return "-"
    return ", ".join(f"{key} {value}" for key, value in cast("Mapping[str, Any]", queue).items()) or "empty"


_GPUS: Mapping[str, Callable[[Row], str]] = {
    "GPU": _text("index"),
    "NAME": _text("name"),
    "TOTAL": _gib("memory_total_bytes"),
    "USED": _gib("memory_used_bytes"),
    "FREE": _gib("memory_free_bytes"),
    "°C": _text("temperature_celsius"),
    "UUID": _text("uuid"),
    "ERROR": _text("error"),
}
_INSTANCES: Mapping[str, Callable[[Row], str]] = {
    "INSTANCE": _text("name"),
    "STATE": _text("state"),
    "VERSION": _text("version"),
    "URL": _text("url"),
    "GPUS": _joined("gpus"),
    "REASON": _text("reason"),
}
_MODELS: Mapping[str, Callable[[Row], str]] = {
    "MODEL": _text("name"),
    "INSTANCE": _text("instance"),
    "STATE": _text("state"),
    "SLOTS": _slots,
    "PER GPU": _gib_per_gpu,
    "CONTEXT": _text("context_length"),
    "REASON": _text("reason"),
}
_RESERVATIONS: Mapping[str, Callable[[Row], str]] = {
    "LOAD": _text("load_id"),
    "INSTANCE": _text("instance"),
    "PER GPU": _gib_per_gpu,
}
_WAITING: Mapping[str, Callable[[Row], str]] = {
    "MODEL": _text("model"),
    "POSITION": _text("position"),
    "WAITED": _seconds("waited_seconds"),
    "ETA": _seconds("expected_wait_seconds"),
    "REQUEST": _text("request_id"),
    "REASON": _text("reason"),
}
