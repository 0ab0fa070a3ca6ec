"""The same relay behind TLS, and the configuration for it. The certificate is for tests and names localhost."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from router.config.settings import ConfigError, load_settings
from tests.proxy.stage import Turn, replying, staged
from tests.support.rawhttp import Connection, request_bytes
from tests.support.waiting import eventually

_FOLDER = Path(__file__).parent / "tls"
_ASK = {"model": "tiny", "prompt": "hi"}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


def _server_side() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_FOLDER / "certificate.pem", _FOLDER / "key.pem")
    return context


async def _connect(port: int) -> Connection:
    trusting = ssl.create_default_context(cafile=str(_FOLDER / "certificate.pem"))
    reader, writer = await asyncio.open_connection("localhost", port, ssl=trusting)
    return Connection(reader, writer, 20.0)


async def test_both_halves_answer_over_tls() -> None:
    async with staged(tls=_server_side()) as stage:
        stage.upstream.script = replying(_HEAD, b'e\r\n{"done":true}\n\r\n', b"0\r\n\r\n")
        connection = await _connect(stage.address.port)
        for _ in range(2):
            assert (await connection.call("POST", "/api/generate", _ASK)).chunks == (b'{"done":true}\n',)
            assert (await connection.call("GET", "/api/tags")).body == b"GET /api/tags 0"
        large = b"x" * 500_000
        assert (await connection.call("POST", "/api/show", large)).body == b"POST /api/show 500000"
        await connection.close()


async def test_a_client_that_leaves_over_tls_ends_its_generation() -> None:
    async def script(turn: Turn) -> None:
        await turn.write(_HEAD)
        await asyncio.Event().wait()

    async with staged(tls=_server_side()) as stage:
        stage.upstream.script = script
        connection = await _connect(stage.address.port)
        await connection.send(request_bytes("POST", "/api/generate", _ASK))
        await connection.head()
        connection.abort()
        await eventually(lambda: stage.upstream.open == 0 and stage.is_at_rest, what="rest")
        assert stage.request_log.statuses == [499]


def test_a_certificate_and_its_key_are_given_together() -> None:
    with pytest.raises(ConfigError, match="set both tls_certificate and tls_key"):
        load_settings(None, {"HOME": "/nowhere", "LLAMAYARD_SERVER__TLS_KEY": "~/key.pem"})
    both = {"LLAMAYARD_SERVER__TLS_KEY": "~/key.pem", "LLAMAYARD_SERVER__TLS_CERTIFICATE": "/c.pem"}
    server = load_settings(None, {"HOME": "/nowhere", **both}).server
    assert (server.tls_key, server.tls_certificate) == (Path("/nowhere/key.pem"), Path("/c.pem"))
