"""Asks the running router, at the address of the configuration."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

from router.config.endpoint import KEY_VARIABLE, Endpoint, UnixAddress

TIMEOUT_SECONDS = 10.0
_ADMIN_PATHS = ("/llamayard/", "/metrics")
_ELSEWHERE = "if the router listens elsewhere, add --port, --host, or the --config that it was started with"


class StatusError(Exception):
    """The router cannot be asked; the text says why and what to do."""


class Refused(Exception):
    """The router answered with an error; the text is its message."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class RouterClient:
    """One router. With a certificate over TLS, trusting only that one."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._address = f"{_reachable(endpoint.host)}:{endpoint.port}"

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path that only llamayard has. Errors as `call`."""
        return self.call("GET", path)

    def call(
        self, method: str, path: str, body: object = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        """The JSON object that a request is answered with.

        Raises:
            StatusError: no answer in time, or the server is not llamayard.
            Refused: the router's error.
        """
        return self._answer(method, path, body, timeout_seconds)[0]

    def headers_of(
        self, method: str, path: str, body: object, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> Mapping[str, str]:
        """The headers of the answer, in lower case. Errors as `call`."""
        return self._answer(method, path, body, timeout_seconds)[1]

    @contextmanager
    def lines(self, method: str, path: str, body: object, timeout_seconds: float) -> Generator[Iterator[str]]:
        """The lines of an answer as they come; `timeout_seconds` without one is an error. Errors as `call`."""
        with ExitStack() as stack:
            with self._translated():
                connection = stack.enter_context(closing(self._connection(path, timeout_seconds)))
                reply = self._request(connection, method, path, body)
                raw = b"" if reply.status == http.client.OK else reply.read()
            if reply.status != http.client.OK:
                self._document(reply.status, path.partition("?")[0], raw)
            yield self._read_lines(reply)

    def _read_lines(self, reply: http.client.HTTPResponse) -> Iterator[str]:
        while True:
            with self._translated():
                line = reply.readline()
            if not line:
                return
            yield line.decode("utf-8", "replace").rstrip("\n")

    def _answer(
        self, method: str, path: str, body: object, timeout_seconds: float
    ) -> tuple[dict[str, Any], Mapping[str, str]]:
        status, headers, raw = self._exchange(method, path, body, timeout_seconds)
        return self._document(status, path.partition("?")[0], raw), headers

    def _document(self, status: int, route: str, raw: bytes) -> dict[str, Any]:
        """The JSON object of an answer. Errors as `call`."""
        try:
            document: object = json.loads(raw)
        except ValueError as error:
            if status != http.client.OK:
                raise self._foreign(status, route) from error
            raise StatusError(f"{self._address} answers {route}, but not JSON") from error
        if not isinstance(document, dict):
            raise StatusError(f"{self._address} answers {route}, but not a JSON object")
        fields = cast("dict[str, Any]", document)
        if status != http.client.OK:
            message = fields.get("error")
            if not isinstance(message, str):
                raise self._foreign(status, route)
            if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                message = f"{message} ({KEY_VARIABLE}; `llamayard keys create NAME --class admin --class inference`)"
            raise Refused(message, status)
        return fields

    def _exchange(
        self, method: str, path: str, body: object, timeout_seconds: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        with self._translated(), closing(self._connection(path, timeout_seconds)) as connection:
            reply = self._request(connection, method, path, body)
            names = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, names, reply.read()

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object
    ) -> http.client.HTTPResponse:
        headers = {"Host": f"localhost:{self._endpoint.port}"}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection.request(method, path, body=payload, headers=headers)
        return connection.getresponse()

    @contextmanager
    def _translated(self) -> Generator[None]:
        """Errors of the connection as StatusError."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:  # ssl.SSLError is an OSError
            reason = str(error) or type(error).__name__
            raise StatusError(
                f"no answer from {self._address} ({reason}): is `llamayard serve` running? {_ELSEWHERE}"
            ) from error

    def _connection(self, path: str, timeout_seconds: float) -> http.client.HTTPConnection:
        endpoint, certificate = self._endpoint, self._endpoint.tls_certificate
        if endpoint.admin is not None and path.startswith(_ADMIN_PATHS):
            if isinstance(endpoint.admin, UnixAddress):
                return _UnixConnection(endpoint.admin.path, timeout_seconds)
            return http.client.HTTPConnection(
                _reachable(endpoint.admin.host), endpoint.admin.port, timeout=timeout_seconds
            )
        host, port = _reachable(endpoint.host), endpoint.port
        if certificate is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_seconds)
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False  # the address is used, which a certificate rarely contains
        return http.client.HTTPSConnection(host, port, timeout=timeout_seconds, context=context)

    def _foreign(self, status: int, route: str) -> StatusError:
        return StatusError(
            f"{self._address} answers {status} to {route}: it is not llamayard, perhaps a stock Ollama; {_ELSEWHERE}"
        )


def _reachable(host: str) -> str:
    """The address of a listener on `host`, from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
