"""Calls the running router's own endpoints, for the commands that show or change its state."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

_ELSEWHERE = "if the router listens elsewhere, add --port, --host, or the --config that it was started with"


class AdminError(Exception):
    """The router cannot be reached, or refuses; the text says why and what to do."""


def call_router(
    host: str,
    port: int,
    certificate: Path | None,
    path: str,
    command: Mapping[str, Any] | None = None,
    timeout_seconds: float = 10.0,
) -> dict[str, Any]:
    """The JSON object that the router at that address answers; with a certificate over TLS, trusting only that one.

    `command` is sent by POST; without one the path is read by GET.

    Raises:
        AdminError: no answer in time, the server is not llamayard, or it refuses the command.
    """
    address = f"{_reachable(host)}:{port}"
    try:
        with closing(_connection(_reachable(host), port, certificate, timeout_seconds)) as connection:
            headers = {"Host": f"localhost:{port}", "Content-Type": "application/json"}
            body = None if command is None else json.dumps(command).encode()
            connection.request("GET" if command is None else "POST", path, body, headers)
            reply = connection.getresponse()
            answer = reply.read()
    except (OSError, http.client.HTTPException) as error:  # ssl.SSLError is an OSError
        reason = str(error) or type(error).__name__
        raise AdminError(f"no answer from {address} ({reason}): is `llamayard serve` running? {_ELSEWHERE}") from error
    document = _document(answer)
    if reply.status != http.client.OK:
        if reply.getheader("X-Llamayard-Error") and document is not None:
            raise AdminError(str(document.get("error")))
        raise AdminError(
            f"{address} answers {reply.status} to {path}: it is not llamayard, perhaps a stock Ollama; {_ELSEWHERE}"
        )
    if document is None:
        raise AdminError(f"{address} answers {path}, but not {_kind(answer)}")
    return document


def _document(answer: bytes) -> dict[str, Any] | None:
    try:
        document: object = json.loads(answer)
    except ValueError:
        return None
    return cast("dict[str, Any]", document) if isinstance(document, dict) else None


def _kind(answer: bytes) -> str:
    try:
        json.loads(answer)
    except ValueError:
        return "JSON"
    return "a JSON object"


def _connection(host: str, port: int, certificate: Path | None, timeout_seconds: float) -> http.client.HTTPConnection:
    if certificate is None:
        return http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False  # the address is used, which a certificate rarely contains
    return http.client.HTTPSConnection(host, port, timeout=timeout_seconds, context=context)


def _reachable(host: str) -> str:
    """The address of a listener on `host`, from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
